"""Fits scorers to outcomes, and measures how well a score routes."""
