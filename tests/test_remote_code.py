"""A checkpoint loads where hf_mim cannot be imported, through the code that travels with it."""

import ast
import graphlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import perturb
from transformers import Dinov2Config, Dinov2Model

from hf_mim import MIMConfig, MIMForImageClassification, MIMForPreTraining, MIMModel
from hf_mim.modeling import configuration_mim


MODELING = Path(configuration_mim.__file__).resolve().parent
FILES = sorted(path for path in MODELING.glob("*.py") if path.name != "__init__.py")
# What transformers itself needs. Not `__future__`: its annotations switch the validation of configs off.
ALLOWED = {"torch", "transformers", "numpy", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
ALLOWED -= {"__future__"}
IMAGE_PROCESSOR = {"image_processing_mim.py", "pixels.py", "resizing.py"}  # they need Pillow, as every one does

# Run in a fresh process: refuses hf_mim, loads the checkpoint as every Auto class and saves what comes out.
LOAD = """
import importlib.abc, os, sys

class NoPlugin(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_mim":
            raise ImportError("hf_mim cannot be imported here")

sys.meta_path.insert(0, NoPlugin())
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForMaskedImageModeling, AutoModelForPreTraining, pipeline

folder, out = sys.argv[1:]
pixel_values, masks = torch.load(folder + "/inputs.pt", weights_only=True)
trust = {"trust_remote_code": True}
result = {"config": AutoConfig.from_pretrained(folder, **trust).encoder}
model = AutoModel.from_pretrained(folder, **trust).eval()
result["module"] = type(model).__module__
result["encoder"] = model(pixel_values).last_hidden_state
for auto in (AutoModelForPreTraining, AutoModelForMaskedImageModeling):
    pretraining = auto.from_pretrained(folder, **trust).eval()
    result[auto.__name__] = pretraining(pixel_values, masks).loss
classifier = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, **trust).eval()
result["classifier"] = classifier.mim(pixel_values).last_hidden_state
if os.path.isdir(folder + "/readout"):
    readout = AutoModelForImageClassification.from_pretrained(folder + "/readout", **trust).eval()
    result["readout"] = readout(pixel_values).logits
from transformers.dynamic_module_utils import get_class_from_dynamic_module
backbone = get_class_from_dynamic_module("modeling_mim.MIMBackbone", folder).from_pretrained(folder).eval()
result["backbone"] = backbone(pixel_values).feature_maps[0]
model.save_pretrained(folder + "/again")
result["again"] = AutoModel.from_pretrained(folder + "/again", **trust).eval()(pixel_values).last_hidden_state
torch.save(result, out)
"""

CONFIGS = {
    "vit": {"encoder_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4}},
    "convnet": {
        "encoder": "convnet",
        "decoder": "linear",
        "encoder_config": {"model_type": "convnext", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    },
    "native": {
        "encoder": "native",
        "decoder": "linear",
        "encoder_config": {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    },
}


def dinov2_with_abmilp(folder) -> MIMForImageClassification:
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 16, "image_size": 64}
    Dinov2Model(Dinov2Config(**options)).save_pretrained(folder / "dinov2")
    model = MIMForImageClassification.from_encoder(str(folder / "dinov2"), pooler="abmilp", num_labels=5)
    return perturb(model).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_remote_code_alone_gives_the_same_numbers(name, tmp_path):
    torch.manual_seed(0)
    config = MIMConfig(image_size=32 if name == "vit" else 64, **CONFIGS[name])
    model = MIMForPreTraining(config).eval()
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, *(2 * [config.image_size]))
    with torch.no_grad():
        pretrained = model(pixel_values)
        encoded = model.mim(pixel_values).last_hidden_state
    torch.save((pixel_values, pretrained.bool_masked_pos), tmp_path / "inputs.pt")
    if name == "native":
        readout = dinov2_with_abmilp(tmp_path)
        readout.save_pretrained(tmp_path / "readout")
    command = [sys.executable, "-c", LOAD, str(tmp_path), str(tmp_path / "out.pt")]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    result = torch.load(tmp_path / "out.pt", weights_only=True)
    assert result["config"] == config.encoder and result["module"].startswith("transformers_modules.")
    for key in ("encoder", "classifier", "again"):
        assert torch.equal(result[key], encoded), key
    for key in ("AutoModelForPreTraining", "AutoModelForMaskedImageModeling"):
        assert torch.equal(result[key], pretrained.loss), key
    if name == "native":
        with torch.no_grad():
            assert torch.equal(result["readout"], readout(pixel_values).logits)
    assert result["backbone"].flatten(2).shape[1] == encoded.shape[2]


def test_the_saved_code_is_the_whole_of_modeling(tmp_path):
    MIMModel(MIMConfig(image_size=32, **CONFIGS["vit"])).save_pretrained(tmp_path)
    saved = {path.name for path in tmp_path.glob("*.py")}
    # Those travel with a segmenter, and with an image processor of ours.
    assert saved == {path.name for path in FILES} - {"modeling_upernet.py"} - IMAGE_PROCESSOR
    for module_class in json.loads((tmp_path / "config.json").read_text())["auto_map"].values():
        assert f"{module_class.split('.')[0]}.py" in saved


def test_no_circle_of_files():
    """Imports inside functions and for type checkers count too."""
    imports = {}
    for path in FILES:
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        imports[path.stem] = {node.module for node in nodes if node.level}
    list(graphlib.TopologicalSorter(imports).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_can_travel(path):
    """What breaks remote code, found before a user finds it: see "Auto classes and remote code" in CONTRIBUTING."""
    source = path.read_text()
    tree = ast.parse(source)
    in_try = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.Try)
        for node in ast.walk(block)
        if node is not block
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, (
                f"line {node.lineno}: from .file import x"
            )
            assert (MODELING / f"{node.module}.py").exists()
        elif isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in in_try:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                top = name.split(".")[0]
                allowed = ALLOWED | ({"PIL"} if path.name in IMAGE_PROCESSOR else set())
                assert top in allowed, f"line {node.lineno}: {top} may be absent where the code goes"
    # transformers finds the files to copy with a regular expression, in docstrings too.
    for found in re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE):
        assert (MODELING / f"{found}.py").exists(), f"a line that begins like an import of .{found}"
    assert len(source.splitlines()) < 400
