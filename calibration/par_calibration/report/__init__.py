"""Two bundles compared: logits, tokens, likelihoods, images; and the decision."""
