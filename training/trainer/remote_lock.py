"""One run at a time writes to a URL. Object stores know no locks: a small file there is renewed while its run lives,
and one that is not renewed is of a run that died."""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable

from hf_mim.training.common.errors import FolderError
from hf_mim.training.data import urls


NAME = "running.txt"  # in the run's folder at the URL
BEAT = 20.0  # seconds between renewals
PATIENCE = 60.0  # that a run waits to see whether another one lives


class RemoteLock:
    """The right to write to a URL.

    Args:
        url: of the run.
        log: prints a line.
    """

    def __init__(self, url: str, log: Callable[[str], None]):
        self.url, self.log = url, log
        self.owner = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}"
        self.beats, self.ended = 0, threading.Event()
        self.thread = threading.Thread(target=self._renew, daemon=True)

    def take(self) -> None:
        """Raises:
        FolderError: another run is writing there.
        """
        before = self._read()
        if before:
            self.log(f"{self.url} was in use by {owner_of(before)}: looking for {PATIENCE:.0f} seconds whether it is")
            deadline = time.monotonic() + PATIENCE
            while before and time.monotonic() < deadline:
                time.sleep(min(BEAT / 4, PATIENCE / 4))
                if (now := self._read()) != before:
                    before = self._check(now)
        self._write()
        self._check(self._read())  # somebody may have been as quick: the last one has it
        self.thread.start()

    def release(self) -> None:
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()
        if owner_of(self._read()) == self.owner:
            fs, path = urls.filesystem(self.url)
            fs.rm(f"{path}/{NAME}")

    def _check(self, content: str) -> str:
        """Raises:
        FolderError: it is of another run.
        """
        if content and (owner := owner_of(content)) != self.owner:
            message = f"{owner} writes to {self.url}: wait for its end, or choose another training.output_dir"
            raise FolderError(message, self.url)
        return content

    def _renew(self) -> None:
        while not self.ended.wait(BEAT):
            try:
                if owner_of(self._read()) not in ("", self.owner):
                    self.log(f"warning: {owner_of(self._read())} writes to {self.url} too: stop one of the two runs")
                    return
                self._write()
            except Exception:
                continue

    def _read(self) -> str:
        """What stands there; "" for nothing."""
        fs, path = urls.filesystem(self.url)  # in each thread its own
        fs.invalidate_cache()
        try:
            return fs.cat_file(f"{path}/{NAME}").decode(errors="replace")[:500]
        except FileNotFoundError:
            return ""

    def _write(self) -> None:
        self.beats += 1
        fs, path = urls.filesystem(self.url)
        try:
            fs.pipe_file(f"{path}/{NAME}", f"{self.owner}\n{self.beats}\n".encode())
        except FileNotFoundError:  # not every file system makes folders by itself
            fs.makedirs(path, exist_ok=True)
            fs.pipe_file(f"{path}/{NAME}", f"{self.owner}\n{self.beats}\n".encode())


def owner_of(content: str) -> str:
    return content.partition("\n")[0]
