"""Floor 1: feature networks, distances, and the protocol of a number."""
