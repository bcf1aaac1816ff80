"""Logs, spans and metrics of a process, configured by the standard OTEL_* variables."""
