"""TLS of clients and servers: the files, channels that follow their rotation, and hints about failures."""
