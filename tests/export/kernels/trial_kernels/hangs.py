"""A process that imports this writes its number into a folder and does not end."""

import os
import time
from pathlib import Path

Path(os.environ["PARVIS_TEST_HANGS"], str(os.getpid())).touch()
time.sleep(300)
