"""Answers one request: its journey, the cascade, attempts at batchers, and checks of their replies."""
