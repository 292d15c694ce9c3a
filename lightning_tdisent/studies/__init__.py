"""Studies: one YAML becomes trainings, composites, evaluations and a report."""
