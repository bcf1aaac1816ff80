"""Programs that produce the figures in README and docs: each measures a baseline in the same run."""
