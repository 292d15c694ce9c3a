"""Numbers of any model: generated images scored against real ones, likelihoods, errors of conditional samples."""
