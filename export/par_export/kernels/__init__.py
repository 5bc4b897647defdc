"""Bundle to an engine of our own kernels: Triton sources, tiles, lists of launches, compilation ahead of time."""
