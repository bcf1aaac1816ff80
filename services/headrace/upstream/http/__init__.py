"""HTTP to the upstream: its connections, the key, the events of a stream, and one request."""
