"""The commands of `headrace` and their flags: `running` a mesh, `asking` it, `fitting` its routing.

Each command parses its flags here and calls a module of `headrace.cli`. It imports that module only when it
runs, so that `headrace --help` is fast.
"""
