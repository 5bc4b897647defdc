"""How good bundles are, beside real images that no training has seen: likelihood, tokenizer, generated images."""
