"""A page that runs a model in the browser, without a server and without a network: paint a mask, see the prediction."""

import base64
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import PIL.Image

from hf_mim.demo.painted import PaintedModel, to_onnx
from hf_mim.modeling.modeling_mim import MIMForPreTraining
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import load_model
from hf_mim.training.commands.embed import open_splits
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.errors import CheckpointError, FolderError
from hf_mim.training.common.output_folder import check_new_folder
from hf_mim.training.common.titles import name_of
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.own_data import chosen_data, own_data
from hf_mim.training.plots.pictures import examples


PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
PARTS = {"api": "ort.wasm.min.js", "loader": "ort-wasm-simd-threaded.mjs", "machine": "ort-wasm-simd-threaded.wasm"}
TEMPLATE = Path(__file__).with_name("page.html")
SAMPLES = 12


def write_page(
    source: str, out: Path, overrides: Sequence[str] = (), runtime: Path | None = None, force: bool = False
) -> list[Path]:
    """Writes `index.html`, and `model.js` and `runtime.js`, which it reads from beside itself.

    Args:
        source: a checkpoint of pretraining: a folder, a URL or an id on the Hub.
        out: the folder.
        overrides: of the section `data`, for the images on the page; by default those of the run.
        runtime: the npm package onnxruntime-web, as a file or unpacked; None fetches it by npm.
        force: write into a folder that holds something.

    Raises:
        CheckpointError: the model cannot be shown on a page.
        FolderError: the folder holds something, or the package is not to be had.
    """
    check_new_folder(out, force)
    parts, console = None if runtime is None else read_runtime(runtime), RunConsole()
    base = {"data": own_data([source], chosen_data(overrides), console)}
    (data,) = recipes.read_sections(overrides, base, data=DataArguments)
    model = load_model(source).float()
    if model.config.num_channels not in (1, 3):
        message = f"a page shows images of one or three channels, and {source} has {model.config.num_channels}"
        raise CheckpointError(message, source)
    painted, parts = PaintedModel(model), parts or read_runtime(None)
    with console.status("writing the graph"):
        graph = to_onnx(painted)
    page = TEMPLATE.read_text(encoding="utf-8").replace("TITLE", name_of(source).replace("<", "&lt;"))
    facts = describe(model, painted, sample_images(model, data))
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "index.html": page,
        "model.js": f"const MODEL = {json.dumps({**facts, 'graph': text_of(graph)})};\n",
        "runtime.js": f"{parts['api'].decode()}\nconst RUNTIME = {json.dumps(packed(parts))};\n",
    }
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in files]


def describe(model: MIMForPreTraining, painted: PaintedModel, samples: list[str]) -> dict:
    """What the page has to know of a model."""
    mean, std = model.config.statistics()
    return {
        "size": list(painted.size),
        "grid": list(painted.grid),
        "channels": model.config.num_channels,
        "mean": mean,
        "std": std,
        "ratio": model.config.options("masking").get("ratio", 0.75),
        "note": model.target.image_note,
        "samples": samples,
    }


def sample_images(model: MIMForPreTraining, data: DataArguments) -> list[str]:
    """Some images, as the model sees them, as PNG in data URIs."""
    splits, _ = open_splits(data, model.mim)
    images = splits["test"] if "test" in splits else next(iter(splits.values()))
    uris = []
    for pixels in images.__getitems__(examples(images, SAMPLES))[0].images:
        array = pixels.permute(1, 2, 0).numpy()
        file = io.BytesIO()
        PIL.Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(file, "PNG")
        uris.append(f"data:image/png;base64,{text_of(file.getvalue())}")
    return uris


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def packed(parts: dict[str, bytes]) -> dict[str, str]:
    """What a page that lies on a disk may not fetch by itself: browsers let it read scripts only."""
    return {"loader": parts["loader"].decode("utf-8"), "machine": text_of(parts["machine"])}


# ---- the runtime ---------------------------------------------------------------------------------------------------
def read_runtime(place: Path | None) -> dict[str, bytes]:
    """The files of `PARTS`.

    Raises:
        FolderError: they are not there, or npm does not give the package.
    """
    if place is None:
        with tempfile.TemporaryDirectory() as folder:
            return read_runtime(fetch_runtime(Path(folder)))
    if place.is_dir():
        found = {part: next(place.rglob(name), None) for part, name in PARTS.items()}
        if missing := [PARTS[part] for part, path in found.items() if path is None]:
            raise FolderError(f"{place} is no {PACKAGE}: there is no {missing[0]}", str(place))
        return {part: path.read_bytes() for part, path in found.items() if path is not None}
    try:
        with tarfile.open(place) as archive:
            files = {part: archive.extractfile(f"package/dist/{name}") for part, name in PARTS.items()}
            return {part: file.read() for part, file in files.items() if file is not None}
    except (OSError, KeyError, tarfile.TarError) as error:
        raise FolderError(f"{place} is no {PACKAGE}: {error}", str(place)) from error


def fetch_runtime(folder: Path) -> Path:
    """The package as a file, by `npm pack`."""
    remedy = f"get {PACKAGE} elsewhere, by npm pack {PACKAGE}@{VERSION}, and name the file by --runtime"
    if (npm := shutil.which("npm")) is None:
        raise FolderError(f"a page needs npm, which is not installed; or {remedy}", str(folder))
    command = [npm, "pack", "--silent", f"{PACKAGE}@{VERSION}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    archive = next(folder.glob("*.tgz"), None)
    if done.returncode or archive is None:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise FolderError(f"npm does not give {PACKAGE}@{VERSION} ({reason}); {remedy}", str(folder))
    return archive
