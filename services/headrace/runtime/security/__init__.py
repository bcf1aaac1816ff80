"""Who calls a server, what they may do, and the certificates of TLS."""
