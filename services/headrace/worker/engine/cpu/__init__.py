"""Compute a step on CPUs with Headrace's own kernels."""
