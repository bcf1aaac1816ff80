"""Answers a sample of requests a second time, by the other choice, and has both answers compared."""
