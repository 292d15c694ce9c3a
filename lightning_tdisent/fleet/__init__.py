"""Floor 3: plans of independent jobs, and what runs them."""
