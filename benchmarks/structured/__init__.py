"""Measure structured output: what is refused, what it costs, whether answers have their form, and are right."""
