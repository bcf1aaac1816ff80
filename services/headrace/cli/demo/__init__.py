"""Runs the demonstration: a mesh, mixed prompts, a summary and a trace."""
