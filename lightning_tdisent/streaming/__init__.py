"""Floor 1: shards of images."""
