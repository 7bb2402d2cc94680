"""Text, token shards and batches: the way from files to the model's input."""
