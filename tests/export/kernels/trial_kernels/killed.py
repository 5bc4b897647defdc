"""A process that imports this is killed, as where there is too little memory."""

import os
import signal

os.kill(os.getpid(), signal.SIGKILL)
