"""Measures how well the router routes: scores, shares of calls, and whole answers by real models."""
