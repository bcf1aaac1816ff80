"""The batcher of one tier: text in and out, batches of token ids to the workers.

It does not know how a prompt was scored, nor which other tiers exist.
"""

from headrace.runtime import grpc_verbosity as grpc_verbosity  # before grpc is imported
