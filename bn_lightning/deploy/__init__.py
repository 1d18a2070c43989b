"""What is done with a trained checkpoint: `predict`, `export` and `inspect`."""
