"""Real images that no training has seen, as tokens: what likelihoods are measured on."""
