"""Measure structured output: what is refused, what it costs, and whether answers have their form."""
