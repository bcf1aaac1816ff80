"""The router: scores each prompt and sends it to the smallest tier that will answer it well.

It knows tiers by their names and the addresses of their batchers. Tokenizers, batches and workers are not
visible to it.
"""

from headrace.runtime import grpc_verbosity as grpc_verbosity  # before grpc is imported
