"""Headrace: a gRPC mesh for LLM inference.

`headrace.v1` contains the generated stubs, `headrace.client` calls a mesh, `headrace.errors` defines the
exceptions. The services are `headrace.router`, `headrace.batcher` and `headrace.worker`.
"""
