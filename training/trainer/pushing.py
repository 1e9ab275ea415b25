"""The Trainer's pushes to the Hub, at checkpoints and at the end: what they leave there loads."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from transformers.trainer import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from hf_mim.modeling import configuration_mim
from hf_mim.training.common.sharing import file_inside, shareable
from hf_mim.training.trainer.arguments import MIMTrainingArguments


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


class PushingTrainer(Trainer):
    """Pushes models that load. `Trainer`'s own pushes lack the code that loads the weights at checkpoints, hold a
    pickle with the arguments, and a card that calls every model "fine-tuned". Whatever `hub_strategy` says, no
    optimizer's state is sent: it is a pickle."""

    args: MIMTrainingArguments
    # A name and a `PushInProgress`, once there are any; `Trainer` is annotated as if they were always None.
    hub_model_id: Any
    push_in_progress: Any

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(cast(str, self.args.output_dir))

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """As in `Trainer`; the keywords for its model card are ignored, since `hf-mim push` writes one."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self._upload(commit_message, token, revision, in_background=not blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        names = [path for pattern in published_names() for path in Path(checkpoint_folder).glob(pattern)]
        current = self.push_in_progress
        if current is not None and current.is_done():
            current = None
        if current is not None and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # From a copy: the checkpoint may be removed before the upload in the background is through.
        for path in names:
            shutil.copy(path, self.folder)
        job = self._upload(f"Training in progress, step {self.state.global_step}", in_background=True)
        if current is not None:
            current.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]  # annotated as one job

    def _upload(self, message: str, token: str | None = None, revision: str | None = None, in_background: bool = False):
        api, revision = HfApi(token=token), revision or self.args.hub_revision
        files = published_files(self.folder)
        old = [name for name in api.list_repo_files(self.hub_model_id, revision=revision) if is_weights(name)]
        operations: list = [CommitOperationAdd(name, str(f) if isinstance(f, Path) else f) for name, f in files.items()]
        operations += [CommitOperationDelete(name) for name in old if name not in files]
        commit = partial(api.create_commit, self.hub_model_id, operations, commit_message=message, revision=revision)
        return api.run_as_future(commit) if in_background else commit()
