"""A real vLLM behind our batchers and routers; see conftest.py."""
