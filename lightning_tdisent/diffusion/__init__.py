"""Floor 0, torch alone: the table of latent states and the arithmetic on it. Read states, process, objectives, rng."""
