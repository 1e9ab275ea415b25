"""Runs at URLs: a run works in a local folder and is copied from there."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from hf_mim.training.common.errors import FolderError
from hf_mim.training.common.output_folder import LOCK
from hf_mim.training.data import urls
from hf_mim.training.data.fetching import cached, fetch_files
from hf_mim.training.trainer.manifest import DAMAGED, update_manifest
from hf_mim.training.trainer.remote_lock import RemoteLock
from hf_mim.training.trainer.saving import UNFINISHED, last_checkpoint, publish


MARKER = "trainer_state.json"  # the last file of a checkpoint to arrive, and the first to go
OUTGOING = "outgoing"  # in a run's folder: links to what is being copied, which may be rotated away meanwhile
SHOWN = 8  # names of files in a line
LEFT_OUT = "training_args.bin"  # a pickle; recipe.yaml says the same to people


class RemoteRun(TrainerCallback):
    """Copies a run to a URL: complete checkpoints in the background while it trains, all other files at its end, when
    the context that it is is left. Only the main process copies. What fails is logged, and tried again at the next
    save and at the end; it never ends the run.

    Args:
        url: of the run.
        log: prints a line.

    Attributes:
        folder: where the run works.

    Raises:
        ValueError: the URL cannot be used, or holds a secret.
    """

    def __init__(self, url: str, log: Callable[[str], None] = print):
        urls.check_url("training.output_dir", url)
        self.url, self.log = url.rstrip("/"), log
        urls.filesystem(self.url)
        self.folder = cached("runs", self.url)
        self.there: set[str] = set()  # complete checkpoints that are known to be there
        self.failed: dict[str, str] = {}  # what is not there: why
        self.saves = 0
        self.limit: int | None = None
        self.begun = self.ending = False
        self.pool, self.lock = ThreadPoolExecutor(1), RemoteLock(self.url, log)

    # ---- before a run ----------------------------------------------------------------------------------------------
    def traces(self, names: tuple[str, ...]) -> str | None:
        """The first of these files, or of `checkpoint-*`, that is there."""
        tops = {name.partition("/")[0] for name in urls.list_below(self.url)}
        return next((top for top in sorted(tops) if top in names or checkpoint_step(top) is not None), None)

    def fetch_last(self, below: int | None = None) -> int:
        """Brings the last complete checkpoint, and the best that it names, where the local folder has none as late. To
        be called in every process.

        Args:
            below: only of earlier steps than this; later ones turned out to be damaged.

        Returns:
            the step of what is here now; 0 for none.
        """
        state, latest = accelerate.PartialState(), [0]
        if state.is_main_process:
            here, there = last_checkpoint(self.folder), self._complete_there()
            there = [step for step in there if below is None or step < below]
            self.there = {f"checkpoint-{step}" for step in there}
            latest = [max([checkpoint_step(here.name) or 0 if here else 0, *there])]
        if state.num_processes > 1:
            broadcast_object_list(latest)  # machines without it fetch it as well
        name = f"checkpoint-{latest[0]}"
        if state.is_local_main_process and latest[0] and not (self.folder / name / MARKER).is_file():
            best = json.loads(urls.read_url(urls.join(self.url, f"{name}/{MARKER}"))).get("best_model_checkpoint")
            best = Path(best).name if best else name
            for needed in dict.fromkeys((best, name)):
                if not (self.folder / needed / MARKER).is_file():
                    self._fetch(needed)
        if state.is_local_main_process and not (self.folder / "recipe.yaml").is_file():
            fetch_files(self.url, [name for name in urls.list_below(self.url) if name == "recipe.yaml"], self.folder)
        state.wait_for_everyone()
        return latest[0]

    def _fetch(self, name: str) -> None:
        place = urls.join(self.url, name)
        names = [file for file in urls.list_below(place) if file != LEFT_OUT]
        if checkpoint_step(name) is None or MARKER not in names:
            return  # of the best one, rotated away
        self.log(f"fetching {place}")
        staging = self.folder / UNFINISHED / name
        shutil.rmtree(staging, ignore_errors=True)
        fetch_files(place, names, staging)
        state = json.loads((staging / MARKER).read_text(encoding="utf-8"))
        if state.get("best_model_checkpoint"):  # as the other machine called it
            state["best_model_checkpoint"] = str(self.folder / Path(state["best_model_checkpoint"]).name)
            (staging / MARKER).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            update_manifest(staging, MARKER)
        publish(staging, self.folder / name)

    def _complete_there(self) -> list[int]:
        """Steps of the checkpoints whose last file is there, and whole, from the latest on."""
        paths = [name.split("/") for name in urls.list_below(self.url)]
        steps = [checkpoint_step(parts[0]) for parts in paths if parts[1:] == [MARKER]]
        return sorted((step for step in steps if step is not None and self._is_whole(step)), reverse=True)

    def _is_whole(self, step: int) -> bool:
        try:
            state = json.loads(urls.read_url(urls.join(self.url, f"checkpoint-{step}/{MARKER}")))
        except (FileNotFoundError, ValueError):  # cut short
            return False
        return isinstance(state, dict) and state.get("global_step") == step

    # ---- while it trains -------------------------------------------------------------------------------------------
    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.saves, self.limit = self.saves + 1, args.save_total_limit
        self.there.discard(f"checkpoint-{state.global_step}")  # another one of that name
        self.pool.submit(self._copy, self.saves, self._hold(self.saves))

    def _hold(self, number: int) -> dict[str, Path | None]:
        """{checkpoint: links to its files} for all that are here, the latest first; None for one that is there."""
        held: dict[str, Path | None] = {}
        for name in sorted((p.parent.name for p in self.folder.glob(f"checkpoint-*/{MARKER}")), key=_by_step):
            held[name] = None
            if name not in self.there:
                links = held[name] = self.folder / OUTGOING / str(number) / name
                try:
                    shutil.copytree(self.folder / name, links, copy_function=link, dirs_exist_ok=True)
                except (OSError, shutil.Error):  # a full disk: it may be rotated away while it is copied, then
                    held[name] = self.folder / name
        return held

    def _copy(self, number: int, held: dict[str, Path | None]) -> None:
        try:
            if number == self.saves:  # else a later save, which holds what is still wanted, waits already
                self._copy_checkpoints(held)
        finally:
            shutil.rmtree(self.folder / OUTGOING / str(number), ignore_errors=True)

    def _copy_checkpoints(self, held: dict[str, Path | None]) -> None:
        self.failed = {}
        for name, source in held.items():
            if source is None:
                continue
            if self.failed:  # a server that does not answer takes long to fail
                self.failed[name] = next(iter(self.failed.values()))
                continue
            try:
                self._remove([f"{name}/{file}" for file in urls.list_below(urls.join(self.url, name))])
                files = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
                for file in sorted(files, key=lambda file: file == MARKER):
                    self._put(source / file, f"{name}/{file}")
                self.there.add(name)
            except Exception as error:
                self._fault(name, error)
        if all(name in self.there for name in held):
            self._rotate(set(held))

    def _rotate(self, here: set[str]) -> None:
        """Removes what is there and no longer here, but for what another machine left and the limit still allows."""
        try:
            files = [f for f in urls.list_below(self.url) if checkpoint_step(f.partition("/")[0]) is not None]
            complete = {f.partition("/")[0] for f in files if f.endswith(f"/{MARKER}")}
            room = len(complete) if self.limit is None else max(0, self.limit - len(here))
            kept = here | set(sorted(complete - here, key=_by_step)[:room])
            self._remove([file for file in files if file.partition("/")[0] not in kept])
            self.there &= kept
        except Exception as error:  # some buckets forbid it
            self.log(f"old checkpoints stay at {self.url}: {urls.one_line(error)}")

    def _remove(self, names: list[str]) -> None:
        fs, path = urls.filesystem(self.url)
        for name in sorted(names, key=lambda name: not name.endswith(f"/{MARKER}")):
            fs.rm(f"{path}/{name}")
        fs.invalidate_cache()
        for name in {name.partition("/")[0] for name in names}:
            if fs.isdir(f"{path}/{name}"):  # where folders are more than parts of names
                fs.rm(f"{path}/{name}", recursive=True)

    def _put(self, source: Path, name: str) -> None:
        if source.name == LEFT_OUT:
            return
        fs, path = urls.filesystem(urls.join(self.url, name))  # in each thread its own
        try:
            fs.put_file(str(source), path)
        except FileNotFoundError:  # not every file system makes folders by itself
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            fs.put_file(str(source), path)

    def _fault(self, name: str, error: Exception) -> None:
        self.failed[name] = urls.one_line(error)
        again = "" if self.ending else "; it will be tried again"
        self.log(f"cannot copy {name} to {self.url}: {self.failed[name]}{again}")

    # ---- at its beginning and end ----------------------------------------------------------------------------------
    def begin(self, name: str) -> None:
        """Copies a first file.

        Raises:
            FolderError: another run is writing there.
            Unreachable: it cannot be written. At the beginning nothing is lost by that, and no trace is left.
        """
        shutil.rmtree(self.folder / OUTGOING, ignore_errors=True)  # of a process that was killed
        try:
            self.lock.take()
            self._put(self.folder / name, name)
        except Exception as error:
            if last_checkpoint(self.folder) is None:
                (self.folder / name).unlink()
            raise error if isinstance(error, FolderError) else urls.failed(self.url, error, "write") from None
        self.begun = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.begun:  # in the main process
            self.finish()

    def finish(self) -> None:
        """Waits for what is under way, copies what is missing, and logs what could not be copied."""
        self.log(f"copying the run to {self.url}")
        self.pool.shutdown()
        self.saves, self.ending = self.saves + 1, True
        self._copy(self.saves, self._hold(self.saves))
        paths = [path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file()]
        own = [p.as_posix() for p in paths if checkpoint_step(p.parts[0]) is None and not is_scratch(p.parts[0])]
        for name in sorted(own, key=lambda name: name == "config.json"):  # what makes a folder a model comes last
            if len(self.failed) > 1:
                self.failed[name] = next(iter(self.failed.values()))
                continue
            try:
                self._put(self.folder / name, name)
            except Exception as error:
                self.failed[name] = urls.one_line(error)
        if self.failed:
            names = sorted(self.failed, key=lambda name: name.endswith(".py"))
            more = f" and {len(names) - SHOWN} more files" if len(names) > SHOWN else ""
            where = f"They are in {self.folder}; training.resume=true copies again"
            self.log(f"NOT at {self.url}: {', '.join(names[:SHOWN])}{more} ({self.failed[names[0]]}). {where}")
        else:
            self.log(f"all of it is at {self.url}, and a copy in {self.folder}")
        with contextlib.suppress(Exception):  # the network is away: a run that resumes there waits a minute
            self.lock.release()


def is_scratch(name: str) -> bool:
    """Whether an entry of a run's folder means nothing elsewhere."""
    return name in (UNFINISHED, OUTGOING, LOCK) or name.startswith(DAMAGED)


def checkpoint_step(name: str) -> int | None:
    """The step of `checkpoint-<step>`; None for other names."""
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    return int(match[1]) if match else None


def _by_step(name: str) -> int:
    """Latest first."""
    return -(checkpoint_step(name) or 0)


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every disk has links
        shutil.copyfile(source, target)
