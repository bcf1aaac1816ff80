"""The `headrace` command: bring a mesh up on this machine, and talk to any mesh.

`__main__` lists the commands; each has a module of its own beside it. The CLI is a client like any
other: it starts the services as processes and speaks to them over gRPC, and imports none of them.
"""
