"""Commands that use a trained checkpoint: `predict`, `export` and `inspect`."""
