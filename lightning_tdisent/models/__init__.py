"""Model files: cards and experts, composites, truncated models, averages, merges, costs and exports."""
