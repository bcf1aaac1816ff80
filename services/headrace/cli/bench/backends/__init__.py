"""What `headrace bench` sends requests to: a mesh over gRPC, or a server with OpenAI's API over HTTP."""
