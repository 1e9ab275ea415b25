"""What holds for every test: no network, no display, no cache of the user's, and one torch thread per worker."""

import gc
import os
import shutil
import tempfile


# Before anything imports torch, transformers or matplotlib: all of them read their environment once, at import.
CACHE = tempfile.mkdtemp(prefix="hf_mim-tests-")
os.environ.update(
    HF_HOME=CACHE,  # one per worker: remote code is copied there, and a warm cache would hide a missing file
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)
for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_TOKEN"):
    os.environ.pop(name, None)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers with two threads each are slower on two cores than with one. In the environment, not by
    # torch.set_num_threads: the subprocesses that tests start inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish():
    # Trainer collects garbage when it starts, and looking through all that torch and transformers made takes a second.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()
    shutil.rmtree(CACHE, ignore_errors=True)
