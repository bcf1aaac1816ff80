"""The endpoints: HTTP requests to requests of the mesh, and answers back."""
