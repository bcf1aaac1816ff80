"""The flow on a batcher's stream.

`allowance` limits how fast it is read, `credit` how many sequences it holds, and `delivery` how often tokens
are sent. `step_pace` measures the engine's steps.
"""
