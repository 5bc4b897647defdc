"""Engines of our own kernels: cubins that need nothing but the driver."""
