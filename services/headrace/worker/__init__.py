"""The worker: computes tokens from token ids. It does not know text, tenants or other workers."""

from headrace.runtime import grpc_verbosity as grpc_verbosity  # before grpc is imported
