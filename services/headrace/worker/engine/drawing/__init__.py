"""Sampling with plain torch operations, on any device, bit-identical to that of `worker.engine.sampling`.

It is for engines that have no kernels of ours. `editing` applies what changes single logits, `choosing` draws
the tokens, and `batch` keeps the sequences of such an engine. torch and numpy are all it needs.
`verification` samples the tokens of rows with drafts, with any sampler.
"""
