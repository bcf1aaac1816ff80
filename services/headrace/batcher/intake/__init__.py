"""Checks, tokenises and clamps requests before they enter the queue."""
