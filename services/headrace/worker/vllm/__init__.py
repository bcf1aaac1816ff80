"""vLLM as a `Runner`: its AsyncLLM runs in the worker's process, its engine core in processes of its own.

`arguments` translates the settings. `loading` starts vLLM on an event loop of its own (`loop_thread`), in
processes that end with the worker (`lifetime`). `runner` submits sequences and reports one step at a time:
`steps` receives vLLM's statistics of each step, `sequence` translates what vLLM returns, and `drawing` what
vLLM is asked for.

Only this folder imports vLLM, and it runs in an environment without the dependencies of our own engine.
"""
