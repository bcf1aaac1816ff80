"""Watches decisions and their outcomes, and changes the scorer safely: log, shadow, judge and canary."""
