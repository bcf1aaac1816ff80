"""Computes a step on CUDA devices."""
