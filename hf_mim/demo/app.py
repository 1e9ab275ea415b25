"""The demo as an app of Gradio, and as a Space of the Hub."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_mim.demo.looks import Demo
from hf_mim.hub.card import plugin_notes
from hf_mim.hub.files import read_json, weight_files, write_json
from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.loading import INDEX
from hf_mim.training.checkpoint import read_config
from hf_mim.training.common.choices import check_packages
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.errors import FolderError
from hf_mim.training.common.output_folder import check_new_folder
from hf_mim.training.common.sharing import file_inside, shareable
from hf_mim.training.common.titles import name_of


COPIED = ("config.json", "preprocessor_config.json")
SPACE_CARD = """---
title: {title}
emoji: 🎭
colorFrom: indigo
colorTo: yellow
sdk: gradio
sdk_version: {version}
app_file: app.py
---

A masked image model by hf_mim: an image, a mask ratio, and what the model makes of what is hidden. By
`hf-mim demo {source} --space .`
"""
SPACE_APP = '''"""The app of this Space."""

from hf_mim.demo.app import make_app


app = make_app({model!r})

if __name__ == "__main__":
    app.launch()
'''


def make_app(source: str, overrides: Sequence[str] = ()) -> Any:
    """The app, `gradio.Blocks`. Arguments and errors as of `Demo.load`.

    Raises:
        UserError: gradio is not installed.
    """
    check_packages("the demo", ("gradio",), "demo")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # what is looked at is nobody's business
    import gradio

    demo = Demo.load(source, overrides)
    predicts = demo.model is not None

    def look(path: str | None, ratio: float, seed: float):
        """Reconstruction, attention and neighbours of an image."""
        if path is None:
            raise gradio.Error("Choose an image first.")
        try:
            return demo.reconstruct(path, ratio, int(seed)), demo.attention(path), demo.neighbours(path)
        except ValueError as error:
            raise gradio.Error(str(error)) from error

    with gradio.Blocks(title=demo.title, analytics_enabled=False) as app:
        gradio.Markdown(f"# {demo.title}\nHide a share of an image, and see what the model makes of it.")
        with gradio.Row():
            image = gradio.Image(type="filepath", label="image", height=280)
            with gradio.Column():
                ratio = gradio.Slider(0.1, 0.9, demo.ratio, step=0.05, label="mask ratio", visible=predicts)
                seed = gradio.Number(0, precision=0, label="seed of the mask", visible=predicts)
                button = gradio.Button("Look", variant="primary")
        pictures = gradio.Gallery(label="reconstruction", columns=4, visible=predicts, height="auto")
        attention = gradio.Gallery(label="attention of the last block", columns=4, visible=demo.shows_attention)
        near = gradio.Gallery(label=f"nearest of {len(demo.chosen):,} images", columns=4)
        for event in (button.click, image.upload, ratio.release):
            event(look, [image, ratio, seed], [pictures, attention, near], api_name="look")
    return app


def write_space(source: str, out: Path, force: bool = False) -> list[Path]:
    """Writes a Space: its card, `app.py`, `requirements.txt` and, of a local folder, the model, in place of one that is
    there. What may not leave this machine stays, and so does the code of plug-ins, which is said.

    Raises:
        CheckpointError: there is no such checkpoint.
        FolderError: `out` holds something, or the checkpoint itself.
        UserError: gradio is not installed: its version is a part of the card.
    """
    check_packages("the demo", ("gradio",), "demo")
    from importlib.metadata import version

    check_new_folder(out, force)
    folder, weights, configs = Path(source).expanduser(), dict[str, Path](), dict[str, dict]()
    config = read_config(source)
    if folder.is_dir():
        weights = weight_files(folder)
        configs = {name: shareable(read_json(path)) for name in COPIED if (path := file_inside(folder, name))}
    texts = {
        "README.md": SPACE_CARD.format(
            title=name_of(source), source=name_of(source) if weights else shareable(source), version=version("gradio")
        ),
        "app.py": SPACE_APP.format(model="model" if weights else source),
        "requirements.txt": "hf-mim[demo]\n",
    }
    if (model := out / "model").resolve() == folder.resolve():
        raise FolderError(f"{model} is the checkpoint itself: choose another folder for the Space", str(model))
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    write_model(model, weights, configs)
    if config.get("model_type") == MIMConfig.model_type:
        for note in plugin_notes(MIMConfig.from_dict(config)):
            RunConsole().warn(f"{note}. Put it beside app.py, and import it there")
    return [*(out / name for name in texts), *(out / "model" / name for name in (*weights, *configs))]


def write_model(out: Path, weights: dict[str, Path], configs: dict[str, dict]) -> None:
    """Copies a checkpoint, and removes what an earlier one has left there; no weights: only this."""
    for old in [*out.glob("*.safetensors"), out / INDEX, *(out / name for name in COPIED)]:
        old.unlink(missing_ok=True)
    if weights:
        out.mkdir(exist_ok=True)
    for name, path in weights.items():
        shutil.copy(path, out / name)
    for name, config in configs.items():
        write_json(out / name, config)
