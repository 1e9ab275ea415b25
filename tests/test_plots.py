"""Charts as PNG, and beside it as SVG or PDF by the option `figures` of every section that draws."""

import numpy as np
import pytest

from hf_mim.analysis.run import AnalyzeArguments
from hf_mim.modeling.options import OptionError
from hf_mim.training.commands.probe_setup import ProbeArguments
from hf_mim.training.plots import charts
from hf_mim.training.trainer.arguments import MIMTrainingArguments


HISTORY = [{"step": step, "loss": 1 / step, "learning_rate": 0.1} for step in range(1, 30)]
ROW = {"accuracy": 60.0, "low": 55.0, "high": 64.0}
DRAWN = {
    "loss": lambda path, figures: charts.draw_loss(HISTORY, path, figures),
    "confusion": lambda path, figures: charts.draw_confusion(np.eye(3, dtype=int), ["a", "b", "c"], path, figures),
    "accuracies": lambda path, figures: charts.draw_accuracies([("mean", {"trained": ROW})], "run", 1, path, figures),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_chart_is_written_as_png_and_as_what_is_asked_for(name, tmp_path):
    for figures, begin in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        folder = tmp_path / figures
        folder.mkdir()
        DRAWN[name](folder / f"{name}.png", figures)
        assert {path.name for path in folder.iterdir()} == {f"{name}.png", f"{name}.{figures}"}
        assert (folder / f"{name}.{figures}").read_bytes().startswith(begin)
    texts = {"loss": "optimizer step", "confusion": "predicted", "accuracies": "mean (pooler)"}
    assert f">{texts[name]}<" in (tmp_path / f"svg/{name}.svg").read_text()  # text, not outlines


@pytest.mark.parametrize("arguments", [MIMTrainingArguments, ProbeArguments, AnalyzeArguments])
def test_another_format_is_refused(arguments):
    place = {"output_dir": "x"}
    assert arguments(**place, figures="pdf").figures == "pdf"
    with pytest.raises(OptionError, match="figures 'eps'. Choices: png, svg, pdf"):
        arguments(**place, figures="eps")
