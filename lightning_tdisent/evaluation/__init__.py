"""Generate and score images, and measure errors, likelihoods and observations of any model."""
