"""Engines without a server of their own, each run in a child process; `pipe` is what they speak."""
