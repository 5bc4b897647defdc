"""What each matrix of a model is multiplied with, sampled over real generations."""
