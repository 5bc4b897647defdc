"""The kernels, in Triton. Each file can be compiled ahead of time, or run by its interpreter on a CPU."""
