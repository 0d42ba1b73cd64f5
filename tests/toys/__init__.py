"""Networks, batches and helpers that several tests share."""
