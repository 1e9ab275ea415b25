"""One of two processes that train on a stream, for `test_streaming.py`: writes what it saw to the folder given."""

import itertools
import json
import os
import sys
from pathlib import Path

from test_streaming import numbered, values
from test_trainer import make, model

from hf_mim.training.trainer import arguments


arguments.cores_per_process = lambda: 2  # on every machine
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])

# A pass of 64 images in batches of 8 from four workers.
options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "dataloader_num_workers": 2}
trainer = make(folder / "run", model(), numbered((8,) * 8), **options)
trainer.data_collator.normalized = False
seen = [values(batch) for batch in itertools.islice(trainer.get_train_dataloader(), 4)]
trainer.train()

one = make(folder / "lane", model(), numbered((64,), buffer=16), max_steps=3, dataloader_num_workers=1, logging_steps=1)
one.train()
losses = [entry["loss"] for entry in one.state.log_history if "loss" in entry]
(folder / f"{rank}.json").write_text(json.dumps({"seen": sum(seen, []), "losses": losses}))
