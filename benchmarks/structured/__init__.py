"""Measures structured output and tool calls: what can be enforced, at which cost, and whether it helps."""
