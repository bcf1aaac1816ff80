"""Compute a step on CUDA devices."""
