"""How any of our processes lives: settings, logs, telemetry, interceptors, server.

A module enters if two services use it today, its name says its job, it mentions no word of the domain
(no tier, no token, no batch), and it has its own tests. What does not fit that has a home elsewhere.
"""
