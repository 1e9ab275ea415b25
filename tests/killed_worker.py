"""The command line, in which process 1 is killed in the middle of a step as for want of memory; see test_ddp.py."""

import os
import signal
import sys

from hf_mim.cli import main
from hf_mim.training.trainer.trainer import MIMTrainer


STEP = 5


def training_step(self, *args, **kwargs):
    if self.state.global_step == STEP and self.args.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)


step = MIMTrainer.training_step
MIMTrainer.training_step = training_step

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
