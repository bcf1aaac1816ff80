"""Text completions: prompts as text or token ids, with their log-probabilities."""
