"""Converts between text and token ids: chat templates, tokenizers, detokenising, stop texts."""
