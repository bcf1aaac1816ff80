"""The token engine: decides each step, computes it, and reports what it produced.

`seam` says what an engine is; `echo` is one without a model, `torch_engine` one with torch and
transformers. `scheduler` decides what each step computes and `loop` runs the steps on a thread of its
own. Nothing here knows protobuf, gRPC or text; nothing outside this folder imports torch.
"""
