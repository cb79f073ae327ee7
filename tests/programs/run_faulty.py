"""Started by `torchrun`: `train.py`, in which one rank dies or hangs at a step."""

import os
import runpy
import signal
import sys
import time

from finetune.data.batches import Batch

os.environ["NO_TORCH_COMPILE"] = "1"

import finetune.distributed.watchdog
from finetune.trainer import Trainer

fault, rank, step = os.environ["FAULT"].split()
finetune.distributed.watchdog.SILENT_SEC = 4.0
next_batches = Trainer.next_batches


def fail(self: Trainer) -> list[Batch]:
    if self.world.rank == int(rank) and self.step + 1 == int(step):
        if fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "raises":
            raise ValueError("a mistake of ours")
        time.sleep(600)
    return next_batches(self)


Trainer.next_batches = fail  # type: ignore[method-assign]
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
