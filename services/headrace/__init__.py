"""Headrace: a gRPC mesh for LLM inference.

`headrace.v1` holds the generated stubs, `headrace.client` calls a mesh, `headrace.errors` names what
may go wrong. The three services are `headrace.router`, `headrace.batcher` and `headrace.worker`.
"""
