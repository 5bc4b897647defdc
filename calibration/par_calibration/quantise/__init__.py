"""Codes and scales of a matrix that keep what it is multiplied to, on recorded rows.

``scales.py`` searches a scale for each block, ``gptq.py`` rounds row after row and lets later rows make up for the
errors of earlier ones, ``choice.py`` says which matrices are quantised, ``layers.py`` does it for a whole bundle, and
``activations.py`` measures what rounding the rows themselves would cost.
"""
