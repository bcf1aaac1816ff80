"""Works on files of prompts and outcomes, without a mesh."""
