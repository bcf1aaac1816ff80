"""What the router keeps between requests: tiers, thresholds, conversations, feedback, bills."""
