"""A service that speaks OpenAI's API, as a tier of the mesh.

Serves `GenerationService` like a batcher, and asks another service over HTTP: a provider of a large model,
vLLM, SGLang, Ollama, or another mesh's gateway. `python -m headrace.upstream` starts it.
"""
