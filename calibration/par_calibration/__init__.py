"""Calibration: a bundle with smaller weights, or cheaper arithmetic, and the proof that its images do not suffer.

``cli/`` is the command, ``run.py`` the whole way from a bundle to a calibrated one. ``record/`` samples what each
matrix is multiplied with, ``quantise/`` makes codes and scales of a matrix, ``report/`` compares both bundles and
decides.
"""
