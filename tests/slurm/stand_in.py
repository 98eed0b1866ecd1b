#!/usr/bin/env python3
"""In place of the Python of a job: a training that is asked to stop, without a model.

Its first attempt waits for a signal and says that it is not done; the next one ends at once.
"""

import os
import signal
import sys
import time
from pathlib import Path


def stop(number: int, _frame: object) -> None:
    Path(os.environ["MOSHI_TTT_REQUEUE_FILE"]).touch()
    print(f"saved after {signal.Signals(number).name}", flush=True)
    sys.exit(0)


if "finetune.preflight" in sys.argv:
    sys.exit(0)
if int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0:
    print("going on", flush=True)
    sys.exit(0)
if "crash" not in sys.argv:  # which leaves no word when it is ended
    signal.signal(signal.SIGUSR1, stop)
    signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(120)
