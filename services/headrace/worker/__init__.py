"""The worker: token ids in, token ids out. It knows no text, no tenants and no other workers."""

from headrace.runtime import quiet as quiet  # before grpc is imported
