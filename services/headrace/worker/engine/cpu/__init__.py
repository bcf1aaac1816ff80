"""Computes a step on CPUs with kernels of our own."""
