"""Tests of `headrace.endpoints`."""
