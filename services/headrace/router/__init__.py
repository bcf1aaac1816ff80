"""The router: scores each prompt and sends it to the smallest tier that will answer it well.

It knows tiers by their names and their batchers' addresses; tokens, batches and workers are beyond it.
"""

from headrace.runtime import grpc_verbosity as grpc_verbosity  # before grpc is imported
