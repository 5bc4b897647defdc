"""From a bundle to a calibrated one: the whole way."""
