"""Text, token shards and batches: the way from files to the model's input."""

from tinyllm._internal.extras import check_extra

check_extra("train", "tqdm")
