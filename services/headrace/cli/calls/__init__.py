"""Sends requests to a running mesh and prints what it returns."""
