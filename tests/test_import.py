"""`import hf_mim` loads nothing heavy and yet registers; the rest comes with the first config."""

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent

CHECK = """
import sys
import hf_mim
heavy = [name for name in ("torch", "transformers", "numpy", "hf_mim.modeling") if name in sys.modules]
assert not heavy, heavy
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForMaskedImageModeling, AutoModelForPreTraining, AutoImageProcessor
config = AutoConfig.for_model("mim", image_size=32, encoder_config={"size": "tiny", "num_hidden_layers": 1})
assert type(config) is hf_mim.MIMConfig
classes = {
    AutoModel: "MIMModel", AutoModelForPreTraining: "MIMForPreTraining", AutoBackbone: "MIMBackbone",
    AutoModelForMaskedImageModeling: "MIMForPreTraining", AutoModelForImageClassification: "MIMForImageClassification",
}
for auto, name in classes.items():
    assert type(auto.from_config(config)) is getattr(hf_mim, name), name
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
assert hf_mim.MIMConfig in IMAGE_PROCESSOR_MAPPING
assert set(hf_mim.__all__) <= set(dir(hf_mim))
try:
    hf_mim.MIMModell
except AttributeError as error:
    assert "MIMModell" in str(error)
else:
    raise AssertionError("an unknown name is no attribute")
"""


def test_import_is_light_and_the_first_config_registers_everything():
    process = subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


# Whoever loads the table of configs, and whether hf_mim comes before it or only by one of its modules.
FIRST = """
import sys
{first}
from transformers import CONFIG_MAPPING
found = CONFIG_MAPPING["mim"]
import hf_mim
assert found is hf_mim.MIMConfig
"""
TABLE = "transformers.models.auto.configuration_auto"
FIRSTS = (
    "import hf_mim, transformers.trainer",
    f"import {TABLE}, hf_mim",
    # It would register a class that is not there yet if it loaded the table itself.
    f"import hf_mim.modeling.configuration_mim\nassert '{TABLE}' not in sys.modules",
    # These load it while they are half there themselves.
    "import hf_mim.modeling.layers",
    "import hf_mim.modeling.decoders",
)


@pytest.mark.parametrize("first", FIRSTS)
def test_it_registers_whatever_loads_the_table_of_configs(first):
    done = subprocess.run([sys.executable, "-c", FIRST.format(first=first)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
