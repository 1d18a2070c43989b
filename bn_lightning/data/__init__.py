"""Data sets: where they come from, how they are checked, and the batches made of them."""
