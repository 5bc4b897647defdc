"""Sources of kernels that are compiled by tests alone: good ones, and some with each fault that a build refuses."""
