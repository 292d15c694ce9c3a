"""Data sets: shards, their index, decoding and preparation."""
