"""The gRPC server that every service runs: accept loop, interceptor, limits, health and drain."""
