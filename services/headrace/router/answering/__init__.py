"""Answers one request: the journey of the request, the cascade, attempts at batchers, checks of their replies."""
