"""Answers one request: the journey, attempts at batchers and tiers, the cascade, checks of replies."""
