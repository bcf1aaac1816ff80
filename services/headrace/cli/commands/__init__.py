"""What `headrace` can do, and with which flags: `running` a mesh, `asking` it, `fitting` its routing.

Each command reads its flags here and hands over to a module beside this package, which it imports only
then: `headrace --help` is there at once.
"""
