"""A process that imports this ends, as in a crash of the compiler."""

import os

os._exit(3)
