"""Starts the processes of a mesh on this machine, watches and stops them."""
