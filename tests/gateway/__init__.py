"""Tests of headrace.gateway."""
