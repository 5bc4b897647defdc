"""What each matrix of a bundle is multiplied with, sampled over real generations of the runtime.

``rows.py`` says which rows are kept, ``onnx_rows.py`` and ``native_rows.py`` make a call and give the rows of its
products, ``recording.py`` is the folder on disk, one file per image, and ``record.py`` fills it.
"""
