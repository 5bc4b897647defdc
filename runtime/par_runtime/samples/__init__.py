"""Many images for an evaluation (FID and what else compares distributions), as one ``.npz`` that grows on the disk.

``plan.py`` says which images they are, ``resize.py`` makes them another size, ``file.py`` writes them and goes on where
an earlier run ended, ``reading.py`` reads them back, ``run.py`` makes them, and joins what several processes made.
docs/evaluation.md shows it all.
"""

from par_runtime.samples.plan import LABELS, Plan
from par_runtime.samples.reading import open_images
from par_runtime.samples.run import join_samples, make_samples

__all__ = ["LABELS", "Plan", "join_samples", "make_samples", "open_images"]
