"""Chooses tiers by their chance of success and their cost. Tiers need not be ordered."""
