"""Codes and scales trained further, all matrices together, until the model's distributions are the original's again.

GPTQ makes each matrix as good as it can be by itself. What is left adds up from layer to layer, and only the logits
show it. ``latent.py`` has the numbers behind the codes, ``images.py`` makes the images that are learned from,
``train.py`` is the training, ``state.py`` keeps it on disk, so that a stopped one goes on.
"""
