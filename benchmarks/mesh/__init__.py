"""Measure what the mesh costs: an echo engine behind router, batcher and worker, beside the engine alone.

The services run as real processes on loopback. The engine computes nothing, so the figures show messages,
serialisation and scheduling. Each part answers one question; `python -m benchmarks.mesh --help` lists them.
`systems` starts the services, of this checkout and of another one; `answers` sends requests through them, and
`engine` the same requests to an engine in this process. Every answer is checked against its prompt, so that
lost or mixed-up tokens are detected.
"""
