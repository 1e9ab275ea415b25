"""The Trainer's pushes to the Hub, at checkpoints and at the end: what they leave there loads."""

import json
import re
import shutil
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from hf_mim.modeling import configuration_mim
from hf_mim.training.sharing import file_inside, shareable


MODELING = Path(configuration_mim.__file__).resolve().parent


def published_names() -> list[str]:
    """Patterns of what is sent. Named one by one: the folder may be a user's own, and optimizers are pickles. The card
    is sent last, by `hf-mim push`."""
    code = [path.name for path in sorted(MODELING.glob("*.py")) if path.name != "__init__.py"]
    weights = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
    return [*code, *weights, "config.json", "preprocessor_config.json"]


def is_weights(name: str) -> bool:
    """Whether transformers may load a file of this name, in a repository's own folder, as weights."""
    parts = r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    return re.fullmatch(parts, name) is not None


def published_files(folder: Path) -> dict[str, Path | bytes]:
    """{name: file, or its content} of what is sent of a folder, without what must not leave this machine.

    Raises:
        FolderError: one is a symbolic link out of the folder.
    """
    names = sorted({path.name for pattern in published_names() for path in folder.glob(pattern)})
    files: dict[str, Path | bytes] = {name: path for name in names if (path := file_inside(folder, name))}
    if "config.json" in files:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        files["config.json"] = (json.dumps(shareable(config), indent=2) + "\n").encode()
    return files


def check_hub_strategy(strategy: HubStrategy | str) -> None:
    """Raises:
    ValueError: it would send the states of optimizer and random numbers, which are pickles.
    """
    strategy = HubStrategy(strategy)
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"training.hub_strategy={strategy.value} would send the optimizer's state to the Hub, which is a pickle; "
            "choose every_save or end, and resume from the checkpoints in the output folder"
        )


class PushMixin:
    """For a `Trainer` (before it in the bases). Its own pushes lack the code that loads the weights at checkpoints,
    hold a pickle with the arguments, and a card that calls every model "fine-tuned". Whatever `hub_strategy` says, no
    optimizer's state is sent: it is a pickle."""

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **_
    ):
        """As in `Trainer`; the keywords for its model card are ignored, since `hf-mim push` writes one."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self._upload(commit_message, token, revision, run_as_future=not blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        names = [path for pattern in published_names() for path in Path(checkpoint_folder).glob(pattern)]
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # From a copy: the checkpoint may be removed before the upload in the background is through.
        for path in names:
            shutil.copy(path, self.args.output_dir)
        job = self._upload(f"Training in progress, step {self.state.global_step}", run_as_future=True)
        if busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _upload(self, message: str, token: str | None = None, revision: str | None = None, run_as_future: bool = False):
        api, revision = HfApi(token=token), revision or self.args.hub_revision
        files = published_files(Path(self.args.output_dir))
        old = [name for name in api.list_repo_files(self.hub_model_id, revision=revision) if is_weights(name)]
        operations: list = [CommitOperationAdd(name, str(f) if isinstance(f, Path) else f) for name, f in files.items()]
        operations += [CommitOperationDelete(name) for name in old if name not in files]
        return api.create_commit(
            self.hub_model_id, operations, commit_message=message, revision=revision, run_as_future=run_as_future
        )
