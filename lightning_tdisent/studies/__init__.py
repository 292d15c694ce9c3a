"""Studies: trainings, composites, evaluations and a report, all defined by one YAML file."""
