"""A command of ``parvis`` that does not outlive the bench: ``python -m par_runtime.bench.subjects.leash VERB ...``.

The bench holds the other end of this process's standard input, and the system closes it when the bench has ended, even
where it was killed. A verb that reads no input, as ``parvis serve``, would not hear of it. So a thread waits for the
end of the input, which costs nothing meanwhile, and ends the process by SIGTERM then.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading
import time

GRACE_S = 5.0  #: after SIGTERM; nobody waits for its answers any more


def _end_with_the_input() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_input, name="parvis-leash", daemon=True).start()
    runpy.run_module("par_runtime", run_name="__main__", alter_sys=True)
