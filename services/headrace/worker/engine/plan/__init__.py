"""Decide what each engine step computes: the scheduler, the KV blocks, and the loop that runs the steps."""
