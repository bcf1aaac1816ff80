"""Translate between the mesh's contract and OpenAI's HTTP API. Pure functions: no I/O and no clock here."""
