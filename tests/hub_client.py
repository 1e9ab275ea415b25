"""Fresh processes that talk to the Hub of hub_server.py: a worker for many commands, and a loader."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hub_server import OWNER, Hub


ROOT = Path(__file__).resolve().parents[1]

# Runs command lines and pieces of code from stdin, so that one import serves many of them.
WORKER = """
import contextlib, io, json, os, sys, traceback
from hf_mim import cli
for line in sys.stdin:
    request, out, err, code = json.loads(line), io.StringIO(), io.StringIO(), 0
    for name, value in request["environment"].items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(request["run"]) if isinstance(request["run"], list) else exec(request["run"]) or 0
        except BaseException:
            code = traceback.format_exc()
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""

# Loads every source named on stdin as every class, and saves what comes out.
LOAD = """
import importlib.abc, json, sys
jobs = json.load(sys.stdin)
if jobs["blocked"]:
    class NoPlugin(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "hf_mim":
                raise ImportError("hf_mim cannot be imported here")
    sys.meta_path.insert(0, NoPlugin())
    trust = {"trust_remote_code": True}
else:
    import hf_mim
    trust = {}
import torch, transformers
from huggingface_hub import constants
from peft import PeftModel
from PIL import Image
from transformers import pipeline
image = Image.open(jobs["image"])
results = {}
if jobs["blocked"] and not constants.HF_HUB_OFFLINE:
    try:
        transformers.AutoModel.from_pretrained(jobs["sources"][0][1])
        raise SystemExit("remote code ran without leave")
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    assert not any(name.startswith("transformers_modules.") and "mim" in name for name in sys.modules)
for name, model, classifier, revision in jobs["sources"]:
    at = {"revision": revision} if revision else {}
    assert transformers.AutoConfig.from_pretrained(model, **at, **trust).model_type == "mim"
    processor = transformers.AutoImageProcessor.from_pretrained(model, **at)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    found = {"pixel_values": pixels}
    masks = torch.arange(16)[None] % 4 != 0
    with torch.no_grad():
        base = transformers.AutoModel.from_pretrained(model, **at, **trust).eval()
        found["tokens"] = base(pixels).last_hidden_state
        for auto in ("AutoModelForPreTraining", "AutoModelForMaskedImageModeling"):
            found[auto] = getattr(transformers, auto).from_pretrained(model, **at, **trust).eval()(pixels, masks).loss
        # AutoBackbone asks the Hub whether the repository exists: it takes no folder and does not work offline.
        online = name in ("repository", "revision") and not constants.HF_HUB_OFFLINE
        if online:
            backbone = transformers.AutoBackbone.from_pretrained(model, **at, **trust)
        else:
            config = transformers.AutoConfig.from_pretrained(model, **at, **trust)
            kind = type(transformers.AutoBackbone.from_config(config, **trust))
            backbone = kind.from_pretrained(model, **at)
        found["backbone"] = backbone.eval()(pixels).feature_maps[-1]
        extract = pipeline("image-feature-extraction", model=model, **at, **trust)
        found["extracted"] = torch.tensor(extract(image))
        auto = transformers.AutoModelForImageClassification
        found["logits"] = auto.from_pretrained(classifier, **at, **trust).eval()(pixels).logits
        scores = pipeline("image-classification", model=classifier, **at, **trust)(image)
        found["scores"] = torch.tensor([entry["score"] for entry in sorted(scores, key=lambda e: e["label"])])
        adapter = jobs["adapters"] if name == "folder" else "me/adapter"
        found["peft"] = PeftModel.from_pretrained(base, adapter, **at).eval()(pixels).last_hidden_state
    results[name] = found
torch.save(results, jobs["out"])
"""

# Two sources of one model.
SAME = """
import torch
from transformers import AutoModel
one, other = (AutoModel.from_pretrained(name) for name in ("{one}", "{other}"))
assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
"""


def environment(hub: Hub, home: Path, token: str | None = OWNER, **more: str) -> dict[str, str]:
    """Of a process that knows nothing but this Hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    kept |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    kept |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MPLBACKEND": "Agg"}
    return {**kept, **({"HF_TOKEN": token} if token else {}), **more}


class Worker:
    """A process that runs command lines and code: `worker(["push", ...])` -> its exit code, stdout and stderr."""

    def __init__(self, env: dict[str, str], folder: Path):
        command = [sys.executable, "-c", WORKER]
        self.log = Path(env["HF_HOME"] + ".log")  # what is written past the redirection: loggers keep their stream
        with self.log.open("w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            self.process = subprocess.Popen(command, cwd=folder, env=env, **pipes)
        self.said = ""

    def __call__(self, run: list[str] | str, **env: str | None) -> tuple[int, str, str]:
        self.process.stdin.write(json.dumps({"run": run, "environment": {"HF_TOKEN": OWNER, **env}}) + "\n")
        self.process.stdin.flush()
        code, out, err = json.loads(self.process.stdout.readline())
        self.said += out + err
        return code, out, err

    def good(self, run: list[str] | str, **env: str | None) -> str:
        code, out, err = self(run, **env)
        assert code == 0, (code, err)
        return out

    def refused(self, *words: str, **env: str | None) -> str:
        """The one line that a command ends with when it fails."""
        code, out, err = self(list(words), **env)
        assert code == 2 and out == "", (code, out, err)
        assert "Traceback" not in err and err.splitlines()[-1].startswith("error: "), err
        return err.splitlines()[-1].removeprefix("error: ")

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.said += self.log.read_text()
        self.process.stdout.close()
