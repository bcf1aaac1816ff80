"""Calls of tools: the formats in which models write them, from their chat templates to events of answers."""
