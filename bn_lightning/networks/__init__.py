"""Networks with an exchangeable normalization layer."""
