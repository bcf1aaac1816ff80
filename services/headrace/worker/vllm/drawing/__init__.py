"""What the tokens of a sequence depend on, at vLLM: parameters, noise, grammars and resumed tokens.

`sampling` translates a sequence's parameters. What vLLM would draw in another way than the contract says is
handed over (`handover`) to `processor` in vLLM's process, which draws with `worker.engine.drawing`.
`following` finds answers that cannot follow their grammar, and `exactness` checks whether answers are
bit-identical.
"""
