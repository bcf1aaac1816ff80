"""Read the tokenizers of models, for batchers and workers; needs transformers."""
