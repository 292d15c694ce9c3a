"""Priors: densities of the state at the row where the reverse chain starts. They are independent of networks."""
