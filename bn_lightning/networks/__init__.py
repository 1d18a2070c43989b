"""Networks with a configurable normalization layer."""
