"""What runs as a process of its own, the measuring child, the worker of the mesh, and vLLM; and in pytest."""
