"""HTTP: the server, connections, bodies, callers, traces. Knows nothing of OpenAI's API."""
