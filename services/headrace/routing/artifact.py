"""The error of all model files that this library reads."""


class BadArtifact(ValueError):
    """A model file cannot be used. The message names the file and the problem."""
