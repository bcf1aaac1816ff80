"""Read .gguf files."""
