"""``ummim rehearse``: a recipe, shrunk, from shards to a fine-tuned classifier on a laptop, before GPUs are rented."""
