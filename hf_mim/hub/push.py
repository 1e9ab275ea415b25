"""What leaves for the Hub: weights, config with its code, image processor, card, results and pictures."""

import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
)
from transformers.dynamic_module_utils import custom_object_save
from yaml import YAMLError

from hf_mim.hub.card import check_weights, command_of, header_of, make_card, plugin_notes, read_config
from hf_mim.hub.errors import HubError, explain
from hf_mim.hub.files import PICTURES, RESULTS, read_json, read_recipe, weight_files, write_json
from hf_mim.modeling.image_processing_mim import MIMImageProcessor
from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.modeling.options import pair
from hf_mim.training import recipe as recipes
from hf_mim.training.common.errors import CheckpointError, FolderError
from hf_mim.training.common.sharing import file_inside, shareable
from hf_mim.training.trainer.pushing import is_weights


COMMIT = "Upload a model of hf_mim"


@dataclass
class Published:
    """Where a push arrived.

    Args:
        url: of the repository, or of the pull request.
        commit: its hash.
        uploaded: whether there was anything that the repository did not have yet.
        notes: what was kept or removed there, a sentence each.
    """

    url: str
    commit: str
    uploaded: bool
    notes: list[str] = field(default_factory=list)


def push(
    checkpoint: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    pr: bool = False,
    license: str | None = None,
    force: bool = False,
) -> Published:
    """Makes a repository what a checkpoint's folder is, in one commit. Run again after an interruption, it sends only
    what the Hub does not have yet. A `README.md` in the folder is taken as the card; otherwise one is written. A card
    that was edited on the Hub stays, and so does the licence given before.

    Args:
        checkpoint: a folder with config.json and safetensors, such as the output folder of a run.
        repo: `name` or `owner/name`; it is made if there is none.
        private: make it private; an error if it exists and is public.
        revision: a branch, made if there is none; tag: a name for the new commit.
        pr: open a pull request instead of writing to the branch.
        license: for the card, a licence id of the Hub.
        force: replace a card that was edited on the Hub.

    Raises:
        ValueError: the folder holds no checkpoint, the card is not valid, or the options contradict each other.
        HubError: the Hub, or the storage behind it, refuses or cannot be reached.
    """
    check_options(revision, tag, pr)
    folder = Path(checkpoint).expanduser()
    weights, api = weight_files(folder), HfApi()
    check_weights(folder, config := read_config(folder))
    notes = plugin_notes(config)
    with tempfile.TemporaryDirectory() as scratch, hub_errors(repo):
        owned = full_name(api, repo)
        card = read_card(api, owned, revision)
        files = {**weights, **stage(folder, owned, license or license_in(card), Path(scratch))}
        validate(ModelCard.load(files["README.md"]))
        if card not in (None, files["README.md"].read_bytes()) and not force and was_edited(api, owned, card, revision):
            del files["README.md"]
        make_repository(api, owned, private, revision)
        return commit(api, owned, files, notes, revision=revision, tag=tag, pr=pr)


def check_options(revision: str | None, tag: str | None, pr: bool) -> None:
    """Raises:
    ValueError: they contradict each other, or the revision is a commit.
    """
    if pr and (revision or tag):
        raise ValueError("a pull request takes neither --revision nor --tag: its branch is its own")
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"--revision {revision} is a commit, which cannot be written to: name a branch")


def full_name(api: HfApi, repo: str) -> str:
    """`owner/name`: without an owner, it is the one whose token is used.

    Raises:
        LocalTokenNotFoundError: there is no token.
    """
    if get_token() is None:
        raise LocalTokenNotFoundError("no token")
    return repo if "/" in repo else f"{api.whoami()['name']}/{repo}"


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Around what talks to the Hub: one kind of error, whichever library behind it failed.

    Raises:
        HubError: with what is known of the cause in one line.
    """
    try:
        yield
    except (OSError, RuntimeError, HTTPError) as error:  # of the client and of Xet
        message = explain(error)
        if message is None and not is_of_the_client(error):
            raise
        raise HubError(message or f"the upload to {repo} failed: {first_line(error)}", repo) from error


def is_of_the_client(error: BaseException) -> bool:
    """Whether it was raised while Xet or the client was at work: Xet's own are plain `RuntimeError`s."""
    trace, modules = error.__traceback__, set()
    while trace is not None:
        modules.add(str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
        trace = trace.tb_next
    return "huggingface_hub" in modules


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def push_run(folder: Path) -> Published | None:
    """After a pretraining run whose recipe says `push_to_hub`, what its Trainer did not send: card, results, pictures.

    Raises: as of `push`.
    """
    training = read_recipe(folder).get("training", {})
    if not training.get("push_to_hub") or not PartialState().is_main_process:
        return None
    return push(folder, training.get("hub_model_id") or folder.name, revision=training.get("hub_revision"))


# ---- what to send ----------------------------------------------------------------------------------------------------
def stage(folder: Path, repo: str, license: str | None, scratch: Path) -> dict[str, Path]:
    """Everything but the weights: {name in the repository: file}, written to `scratch` where it has to be made.

    Only names known here are taken from the folder, so that optimizer states, pickles and a user's other files stay.

    Raises:
        FolderError: one of them is a symbolic link out of the folder.
    """
    config = read_config(folder)
    processor = check_processor(folder)
    config.save_pretrained(scratch)  # with the whole auto_map, whatever the folder has of it
    custom_object_save(code_of(config), scratch)
    saved = read_json(scratch / "config.json")
    write_json(scratch / "config.json", shareable(saved))
    for name in ("preprocessor_config.json", *PICTURES, "README.md"):
        if (path := file_inside(folder, name)) is not None:
            shutil.copy(path, scratch)
    if processor is None:
        processor_of(config).save_pretrained(scratch)
    elif processor == MIMImageProcessor.__name__:
        MIMImageProcessor.from_pretrained(scratch).save_pretrained(scratch)  # with its code, and none of the folder's
    for name in RESULTS:
        if (path := file_inside(folder, name)) is not None:
            write_json(scratch / name, shareable(read_json(path)))
    if recipe := read_recipe(folder):
        header = header_of(folder)
        paper = f"\n\nPaper: {header['paper']}" if header.get("paper") else ""
        comment = f"The resolved recipe of this model. To run it again:\n{command_of(recipe)}{paper}"
        recipes.save(recipe, scratch / "recipe.yaml", comment)
    if not (scratch / "README.md").is_file():
        make_card(folder, repo, license).save(scratch / "README.md")
    return {path.name: path for path in sorted(scratch.iterdir())}


def check_processor(folder: Path) -> str | None:
    """The class of the image processor of a checkpoint; None where there is none.

    Raises:
        CheckpointError: its file is damaged.
    """
    path = file_inside(folder, "preprocessor_config.json")
    if path is None:
        return None
    if not (saved := read_json(path)):
        raise CheckpointError(f"{path} holds no image processor: remove it, and a new one is made", str(path))
    return str(saved.get("image_processor_type"))


def code_of(config) -> type:
    """A class in whose file, and what that imports, all of a checkpoint's classes are."""
    if config.model_type != "upernet":
        return MIMModel
    from hf_mim.modeling.modeling_upernet import MIMUperNet

    return MIMUperNet


def processor_of(config):
    """The stock image processor for a checkpoint that has none beside it."""
    from hf_mim.training.commands.segmentation import segmentation_processor
    from hf_mim.training.data.processors import processor_for

    if config.model_type != "upernet":
        return processor_for(config)
    return segmentation_processor(config.backbone_config, pair(config.backbone_config.image_size))


def write_card(checkpoint: str | Path, repo: str, out: Path, license: str | None = None, force: bool = False) -> Path:
    """Writes the card that `push` would send, with its pictures, into a folder; returns its file.

    Args:
        force: replace files that are there already.

    Raises:
        CheckpointError: there is no checkpoint.
        FolderError: `out` is no folder, or holds one of the files already.
    """
    folder = Path(checkpoint).expanduser()
    weight_files(folder)
    check_weights(folder, read_config(folder))
    if out.exists() and not out.is_dir():
        raise FolderError(f"{out} is not a folder", str(out))
    same = out.resolve() == folder.resolve()
    pictures = {} if same else {name: path for name in PICTURES if (path := file_inside(folder, name))}
    existing = [name for name in ("README.md", *pictures) if (out / name).exists()]
    if existing and not force:
        message = f"{out / existing[0]} exists already; choose another --out, or replace it with --force"
        raise FolderError(message, str(out))
    card = make_card(folder, repo, license)
    out.mkdir(parents=True, exist_ok=True)
    for path in pictures.values():
        shutil.copy(path, out)
    card.save(out / "README.md")
    return out / "README.md"


# ---- sending it ------------------------------------------------------------------------------------------------------
def validate(card: ModelCard) -> None:
    """Asks the Hub whether a card's metadata is right, before anything is uploaded.

    Raises:
        ValueError: it is not; the message says what is wrong.
    """
    try:
        card.validate()
    except ValueError as error:  # the answer's body
        try:
            reason = "; ".join(str(entry["message"]) for entry in json.loads(str(error))["errors"])
        except (ValueError, KeyError, TypeError):
            reason = " ".join(str(error).split())
        raise ValueError(f"the Hub does not accept the card's metadata: {reason}") from None


def read_card(api: HfApi, repo: str, revision: str | None) -> bytes | None:
    """The README.md of a repository or its branch; None where there is none."""
    if not api.file_exists(repo, "README.md", revision=revision):
        return None
    return Path(hf_hub_download(repo, "README.md", revision=revision)).read_bytes()


def license_in(card: bytes | None) -> str | None:
    """The licence that a card's metadata names."""
    try:
        license = ModelCard((card or b"").decode("utf-8", "replace")).data.get("license")
    except (ValueError, YAMLError):
        return None
    return license if isinstance(license, str) else None


def was_edited(api: HfApi, repo: str, card: bytes | None, revision: str | None) -> bool:
    """Whether a repository's card is another than that of the last push that sent one."""
    pushed = next((entry for entry in api.list_repo_commits(repo, revision=revision) if entry.title == COMMIT), None)
    if pushed is None:
        return True
    return Path(hf_hub_download(repo, "README.md", revision=pushed.commit_id)).read_bytes() != card


def make_repository(api: HfApi, repo: str, private: bool, revision: str | None) -> None:
    """Makes the repository and the branch where there are none.

    Raises:
        ValueError: it was to be private and is public, or the revision is a tag or a commit.
        HfHubHTTPError: no right to.
    """
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo).private:
        raise ValueError(f"{repo} exists and is public: nothing was sent. Choose another name, or leave out --private")
    refs = api.list_repo_refs(repo) if revision else None
    if refs is not None and is_commit(api, repo, revision, [ref.name for ref in refs.branches]):
        raise ValueError(f"--revision {revision} is a commit of {repo}, which cannot be written to: name a branch")
    if refs is not None and any(ref.name == revision for ref in refs.tags):
        raise ValueError(f"--revision {revision} is a tag of {repo}, which cannot be written to: name a branch")
    if revision and not revision.startswith("refs/"):
        api.create_branch(repo, branch=revision, exist_ok=True)


def is_commit(api: HfApi, repo: str, revision: str | None, branches: list[str]) -> bool:
    """Whether a revision is the beginning of a commit's hash, as `git log --oneline` prints it."""
    if revision in branches or not re.fullmatch(r"[0-9a-f]{7,40}", revision or ""):
        return False
    return any(entry.commit_id.startswith(str(revision)) for entry in api.list_repo_commits(repo))


def commit(api: HfApi, repo: str, files: dict[str, Path], plugins: Sequence[str], *, revision, tag, pr) -> Published:
    """One commit with what the repository does not have yet, and without what belongs to an earlier push."""
    before = api.repo_info(repo, revision=revision).sha
    old = old_files(api.list_repo_files(repo, revision=revision), set(files))
    operations: list = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()
    ]
    operations += [CommitOperationDelete(path_in_repo=name) for name in old]
    message = COMMIT if "README.md" in files else f"{COMMIT}, its card kept"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the validator would recommend besides
        done = api.create_commit(
            repo,
            operations,
            commit_message=message,
            revision=revision,
            create_pr=pr,
        )
    if tag:
        make_tag(api, repo, tag, done.oid)
    notes = [f"plug-in {note}" for note in plugins]
    notes += [f"removed there, since the folder does not have it: {name}" for name in old]
    if "README.md" not in files:
        notes.append("README.md was edited on the Hub and stays as it is there; --force replaces it")
    return Published(done.pr_url or f"{api.endpoint}/{repo}", done.oid, uploaded=done.oid != before, notes=notes)


def old_files(names: list[str], sent: set[str]) -> list[str]:
    """What of a repository's files belongs to other weights than those that are sent."""
    own = {*RESULTS, *PICTURES, "recipe.yaml"}
    return sorted(name for name in names if name not in sent and (is_weights(name) or name in own))


def make_tag(api: HfApi, repo: str, tag: str, commit: str) -> None:
    """Raises:
    ValueError: the tag exists and means another commit.
    """
    try:
        api.create_tag(repo, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        if not any(ref.name == tag and ref.target_commit == commit for ref in api.list_repo_refs(repo).tags):
            raise ValueError(f"the files were sent, but {repo} has a tag {tag} of another commit") from None
