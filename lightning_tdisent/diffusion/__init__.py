"""The table of latent states and its arithmetic; needs torch alone. Read table, process, objectives, rng."""
