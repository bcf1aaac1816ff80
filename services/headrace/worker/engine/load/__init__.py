"""Makes a checked engine from model files."""
