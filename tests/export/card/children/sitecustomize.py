"""Read by every process that a report of the tests starts: the GPU that it finds is the stand-in.

The stand-in knows the engines of the bundle that the process is given, and the kernels of the card's limits. Launches
are checked, and compute nothing unless a test asks for it; but single products always do.
"""

import json
import os
import sys

for name in filter(None, os.environ.get("PARVIS_TEST_BLOCK", "").split(",")):
    sys.modules[name] = None  # as where it is not installed

if "PARVIS_TEST_STAND_IN" in os.environ and len(sys.orig_argv) > 2:
    from pathlib import Path

    from double.bare import Failing, driver_for

    from par_export.card import driver, limits
    from par_runtime.backends import cuda

    spec = json.loads(sys.orig_argv[-1])
    cuda.driver = driver_for(Path(spec.get("path", ".")))
    cuda.driver.memory_bytes = 2**34
    cuda.driver.fill = 0  # what no kernel writes must be tokens all the same, or nothing would be timed
    cuda.driver.twin = Failing(cuda.driver)
    if "PARVIS_TEST_COMPUTES" in os.environ and "path" in spec:
        from double.twins import Twins

        from par_export.card import subject

        cuda.driver.twin = Twins(cuda.driver)
        subject.REPEATS = 1
    if "plan" in spec:
        from double.twins import Twins

        from par_export.card import product_times
        from par_export.card.product_files import ProductKernels

        cuda.driver.twin = Twins(cuda.driver)
        product_times.LAUNCHES = product_times.REPEATS = 1
        ready = ProductKernels.read(Path(spec["folder"]))
        for name, kernel in ready.kernels.items():
            cuda.driver.register(ready.cubin(name), kernel, (8, 0))
    driver.LARGE, driver.LEAK = 2**20, 2**10
    for kernel, text in (*map(limits.empty_kernel, (False, True)), driver.fault_kernel()):
        cuda.driver.register(text, kernel, (8, 0))
