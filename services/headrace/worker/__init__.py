"""The worker: computes tokens from token ids. It does not know text, tenants or other workers."""

from headrace.runtime import quiet as quiet  # before grpc is imported
