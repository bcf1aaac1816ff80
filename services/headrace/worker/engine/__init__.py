"""The inference engine: plans each step, computes it, and reports the tokens.

`interface` defines an engine; `echo` is one without a model, `torch_engine` one that computes on a CPU, and
`gpu/engine` one that computes on a GPU, one step ahead. `plan/` decides what each step computes and runs the
steps on a thread of their own, as a `Runner`.

| | `cpu/` | `gpu/` |
|---|---|---|
| inputs of a step | `flat_step` | `gpu/filling`, `gpu/step_inputs` |
| Llama-like models | `cpu/decoder` | `gpu/decoder` |
| other models | `forward` | `gpu/network_forward` |
| attention | `cpu/kernel_attention` | `gpu/paged_attention` |
| sampling | `sampling` | `gpu/sampler` |
| kernels | `cpu/kernels`, compiled by numba | `gpu/kernels`, in Triton |

`transformers_attention` connects the code of transformers to paged KV memory, `attention_kinds` chooses the
implementation, and `plain_attention` is their reference in plain torch. `noise` and `fixed_math` define the
arithmetic of sampling, which both sides compute with the same bits. `load/` makes an engine from files,
checks it and sizes its memory. Nothing here knows protobuf, gRPC or text; nothing outside this folder imports
torch.
"""
