"""Chat completions: conversations to requests of the mesh, and answers back."""
