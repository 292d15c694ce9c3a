"""Fleets: plan many independent training jobs, and run them with workers on one or more machines."""
