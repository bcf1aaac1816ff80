"""Measure structured output: refusals, costs, whether answers have their form, and whether they are right."""
