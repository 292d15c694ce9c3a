"""Floor 3: evaluation of finished models, figures and pages."""
