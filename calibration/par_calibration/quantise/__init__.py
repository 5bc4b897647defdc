"""Codes and scales of a matrix that change its products least."""
