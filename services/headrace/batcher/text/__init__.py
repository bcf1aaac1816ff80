"""Converts between text and token ids: chat templates, tokenizers, detokenizing, stop strings."""
