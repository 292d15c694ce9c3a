"""Fleets: plans of independent jobs, and what runs them."""
