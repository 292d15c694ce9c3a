"""Floor 2: denoisers, the reverse loop, and the composition of experts. Read denoiser, sampler, composite, expert."""
