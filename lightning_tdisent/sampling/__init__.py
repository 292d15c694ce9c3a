"""Denoisers and the reverse loop. Read denoiser, then sampler."""
