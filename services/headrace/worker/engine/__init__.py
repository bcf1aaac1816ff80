"""The inference engine: plans each step, computes it, and reports the tokens.

`interface` defines an engine; `echo` is one without a model, `torch_engine` one with torch and transformers.
`plan/` decides what each step computes and runs the steps on a thread of their own, as a `Runner`. A step
goes from rows (`flat_step`) through a `forward` to logits, and through `sampling` to tokens.
`transformers_attention` connects a model to paged KV memory, and `attention_kinds` chooses the
implementation. `cpu/` and `gpu/` hold the fast ones. `load/` makes an engine from files, checks it and sizes
its memory. Nothing here knows protobuf, gRPC or text; nothing outside this folder imports torch.
"""
