"""Sequences with grammars: `preparation` before they are scheduled, `constraints` when they are sampled."""
