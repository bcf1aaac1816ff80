"""Reads .gguf files."""
