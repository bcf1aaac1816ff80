"""Load a model from its files, check it, and build an engine that serves it."""
