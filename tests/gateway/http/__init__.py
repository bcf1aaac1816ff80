"""Tests of headrace.gateway.http."""
