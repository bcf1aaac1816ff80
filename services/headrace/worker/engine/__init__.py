"""The token engine: decides each step, computes it, and reports what it produced.

`seam` says what an engine is; `echo` is one without a model, `torch_engine` one with torch and
transformers. `scheduler` decides what each step computes and `loop` runs the steps on a thread of its
own. A step goes from rows (`flat_step`) through a `forward` to logits and from there through `sampling`
to tokens; `attention` is where a model meets paged memory, and `attention_kinds` the ways to attend.
`loading` makes an engine from files, checks it (`selfcheck`) and sizes its memory (`kv_sizing`). Nothing
here knows protobuf, gRPC or text; nothing outside this folder imports torch.
"""
