"""Engines without a server of their own, each run in a child process that exchanges messages by `pipe`."""
