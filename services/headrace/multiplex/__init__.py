"""Carry many Generate requests on one stream: GenerationService.Multiplex.

`calling` is the caller's end: the client library uses it, and so does the router for its batchers. `serving`
is the server's end, in router and batcher. See `protos/headrace/v1/generation_service.proto`.
"""
