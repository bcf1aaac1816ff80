"""What every process of Headrace shares: settings, telemetry, and the gRPC server in `serving`.

A module enters if two services use it today, its name states its job, it mentions no term of the domain (no
tier, no token, no batch), and it has its own tests. Other code belongs to the service that uses it.
"""
