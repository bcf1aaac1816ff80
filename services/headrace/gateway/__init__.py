"""Serve the OpenAI-compatible HTTP API in front of a router, which it calls as any other client does."""
