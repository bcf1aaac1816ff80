"""Scores prompts and conversations."""
