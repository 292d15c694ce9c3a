"""Floor 3: the only place that imports Lightning."""
