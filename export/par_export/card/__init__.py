"""The report of a GPU, ``parvis bench --suite gpu``: is what our kernels compute right, and how fast are they?

``report.py`` is the whole of it; every stage runs in a process of its own (``stages.py``), because a fault of a kernel
ends whatever else its process does.
"""
