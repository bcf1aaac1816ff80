"""Responses of real servers: the HTTP status in the first line, and the body."""
