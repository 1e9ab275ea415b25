"""What leaves for the Hub: weights, config with its code, image processor, card, results and pictures."""

import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from hf_mim.hub.card import PICTURES, command_of, make_card, read_config, read_json, read_recipe, shareable
from hf_mim.training import recipe as recipes


INDEX = "model.safetensors.index.json"
RESULTS = ("metrics.json", "probe.json")


@dataclass
class Published:
    """Where a push arrived.

    Args:
        url: of the repository, or of the pull request.
        commit: its hash.
        uploaded: whether there was anything that the repository did not have yet.
    """

    url: str
    commit: str
    uploaded: bool


def push(
    checkpoint: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    pr: bool = False,
    license: str | None = None,
) -> Published:
    """Publishes a checkpoint with everything that loading and understanding it takes, with the token of `hf auth login`
    or HF_TOKEN. Run again after an interruption, it sends only what the Hub has not got yet. A `README.md` in the
    folder is taken as the card; otherwise one is written.

    Args:
        checkpoint: a folder with config.json and safetensors, such as the output folder of a run.
        repo: `name` or `owner/name`; it is made if there is none.
        private: make it private; an error if it exists and is public.
        revision: a branch, made if there is none.
        tag: a name for the new commit.
        pr: open a pull request instead of writing to the branch.
        license: for the card, as the Hub names licences.

    Raises:
        ValueError: the folder holds no checkpoint, the card is not valid, or the options contradict each other.
        OSError: the Hub refuses, or cannot be reached.
    """
    if pr and (revision or tag):
        raise ValueError("a pull request takes neither --revision nor --tag: its branch is its own")
    folder = Path(checkpoint).expanduser()
    weights = weight_files(folder)
    api = HfApi()
    if get_token() is None:
        raise LocalTokenNotFoundError("no token")
    with tempfile.TemporaryDirectory() as scratch:
        owned = repo if "/" in repo else f"{api.whoami()['name']}/{repo}"
        files = {**weights, **stage(folder, owned, license, Path(scratch))}
        validate(ModelCard.load(files["README.md"]))
        make_repository(api, owned, private, revision)
        return commit(api, owned, files, revision=revision, tag=tag, pr=pr)


def push_run(folder: Path) -> Published | None:
    """After a pretraining run whose recipe says `push_to_hub`, what its Trainer did not send: card, results, pictures.

    Raises: as of `push`.
    """
    training = read_recipe(folder).get("training", {})
    if not training.get("push_to_hub") or not PartialState().is_main_process:
        return None
    return push(folder, training.get("hub_model_id") or folder.name, revision=training.get("hub_revision"))


# ---- what to send ----------------------------------------------------------------------------------------------------
def weight_files(folder: Path) -> dict[str, Path]:
    """The safetensors of a checkpoint: {name: file}.

    Raises:
        ValueError: there are none, or the index names something that is no file of this folder.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"no checkpoint at {folder}: there is no config.json")
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": folder / "model.safetensors"}
    if not (folder / INDEX).is_file():
        pickles = next((path.name for path in folder.glob("*.bin")), None)
        found = f"{pickles} is a pickle, which is neither read nor published" if pickles else "there are no weights"
        raise ValueError(f"no model.safetensors in {folder}: {found}")
    names = {str(name) for name in read_json(folder / INDEX).get("weight_map", {}).values()}
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise ValueError(f"{folder / INDEX} names {name!r}, which is no safetensors file of this folder")
    return {name: folder / name for name in sorted(names | {INDEX})}


def stage(folder: Path, repo: str, license: str | None, scratch: Path) -> dict[str, Path]:
    """Everything but the weights: {name in the repository: file}, written to `scratch` where it has to be made.

    Only names known here are taken from the folder, so that optimizer states, pickles and a user's other files stay.
    """
    config = read_config(folder)
    config.save_pretrained(scratch)  # with the code and the whole auto_map, whatever the folder has of them
    saved = read_json(scratch / "config.json")
    write_json(scratch / "config.json", shareable(saved))
    if (folder / "preprocessor_config.json").is_file():
        shutil.copy(folder / "preprocessor_config.json", scratch)
    else:
        from hf_mim.training.data.processors import processor_for

        processor_for(getattr(config, "backbone_config", config)).save_pretrained(scratch)
    for name in RESULTS:
        if (folder / name).is_file():
            write_json(scratch / name, shareable(read_json(folder / name)))
    if (folder / "recipe.yaml").is_file():
        header = recipes.read_header(folder / "recipe.yaml")
        paper = f"\n\nPaper: {header['paper']}" if header.get("paper") else ""
        recipe = read_recipe(folder)
        comment = f"The resolved recipe of this model. To run it again:\n{command_of(recipe)}{paper}"
        recipes.save(recipe, scratch / "recipe.yaml", comment)
    for name in (*PICTURES, "README.md"):
        if (folder / name).is_file():
            shutil.copy(folder / name, scratch)
    if not (scratch / "README.md").is_file():
        make_card(folder, repo, license).save(scratch / "README.md")
    return {path.name: path for path in sorted(scratch.iterdir())}


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_card(checkpoint: str | Path, repo: str, out: Path, license: str | None = None) -> Path:
    """Writes the card that `push` would send, with its pictures, into a folder; returns its file.

    Raises:
        ValueError: there is no checkpoint, or `out` is no folder.
    """
    folder = Path(checkpoint).expanduser()
    weight_files(folder)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is no folder")
    card = make_card(folder, repo, license)
    out.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        if (folder / name).is_file() and out.resolve() != folder.resolve():
            shutil.copy(folder / name, out)
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
            said = "; ".join(str(entry["message"]) for entry in json.loads(str(error))["errors"])
        except (ValueError, KeyError, TypeError):
            said = " ".join(str(error).split())
        raise ValueError(f"the Hub does not accept the card's metadata: {said}") from None


def make_repository(api: HfApi, repo: str, private: bool, revision: str | None) -> None:
    """Makes the repository and the branch where there are none.

    Raises:
        ValueError: it was to be private and is public.
        HfHubHTTPError: no right to.
    """
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo).private:
        raise ValueError(f"{repo} exists and is public: nothing was sent. Choose another name, or leave out --private")
    if revision and not revision.startswith("refs/"):
        api.create_branch(repo, branch=revision, exist_ok=True)


def commit(api: HfApi, repo: str, files: dict[str, Path], *, revision, tag, pr) -> Published:
    """One commit with what the repository does not have yet."""
    before = api.repo_info(repo, revision=revision).sha
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the validator would recommend besides
        done = api.create_commit(
            repo, operations, commit_message="Upload a model of hf_mim", revision=revision, create_pr=pr
        )
    if tag:
        make_tag(api, repo, tag, done.oid)
    return Published(done.pr_url or f"{api.endpoint}/{repo}", done.oid, uploaded=done.oid != before)


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
