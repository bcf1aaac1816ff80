"""Scores prompts, checks drafts and chooses tiers: a library without gRPC.

The router, the CLI and the benchmarks use it.
"""
