"""Where the reverse chain starts: densities of the state at its last row. They know nothing of networks."""
