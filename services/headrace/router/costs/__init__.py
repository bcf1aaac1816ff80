"""Expects what answers cost, weighs it against their quality, and keeps a budget per day."""
