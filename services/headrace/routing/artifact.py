"""What is wrong with a file of a model, of whichever kind."""


class BadArtifact(ValueError):
    """A model file cannot be used. The message names the file and says what is wrong with it."""
