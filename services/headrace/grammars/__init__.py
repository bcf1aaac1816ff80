"""Restrict answers to grammars: what a form of `headrace.v1.Sampling` allows, token by token.

`forms` turns the forms that callers ask for (JSON schemas, regular expressions and so on) into grammars in
llguidance's format. `compiling` compiles grammars for the `vocabulary` of one model, within bounds, and
`matching` follows answers and computes which tokens may come next. A batcher checks grammars before it
accepts a request, and a worker enforces them. The parser is llguidance: docs/performance.md compares it with
xgrammar. The state of a matcher is a function of the grammar and the tokens, so any worker can rebuild it.
"""
