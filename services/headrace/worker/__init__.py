"""The worker: token ids in, token ids out. It knows no text, no tenants and no other workers."""

from headrace.runtime import grpc_verbosity as grpc_verbosity  # before grpc is imported
