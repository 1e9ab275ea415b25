"""Settings for training on a CPU. torch and OpenMP read them once, when torch is imported."""

import os
import sys


# What the drivers of NVIDIA's and AMD's GPUs leave, the last under WSL. To ask torch would take a second and a half.
GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def tune_for_cpu() -> None:
    """Sets them in this process's environment, unless there is a GPU or torch is imported already. What is set stays.

    GOMP_SPINCOUNT=1000, where nothing about waiting is set: threads that spin for long while they wait for each other
    make a training step tens of times slower as soon as another program needs one of the cores; threads that sleep at
    once make it slower on free cores. Milliseconds a step with the recipe `quick` on two cores, free and with one of
    them busy: 21 and over 460 by default, 25 and 59 with this count, 42 and 38 with OMP_WAIT_POLICY=PASSIVE.
    THP_MEM_ALLOC_ENABLE=1: torch asks for memory in large pages; a step of `quick` takes a twentieth less.
    """
    if os.name != "posix" or "torch" in sys.modules or any(map(os.path.exists, GPUS)):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
