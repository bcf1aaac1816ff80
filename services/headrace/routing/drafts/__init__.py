"""Checks drafts by their form, arithmetic and log-probabilities, and by comparison with a sample."""
