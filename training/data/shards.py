"""The shards of a stream, dealt to lanes: which image comes when, and how to get there without reading all before it.

A stream is read by many: the workers of the loaders of all processes. Its shards are therefore dealt to as many
*lanes*, each of which is shuffled and goes from pass to pass by itself, and whoever needs a lane opens its shards only.
"""

import gzip
import itertools
import tarfile
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import numpy as np
import pyarrow
import torch

from hf_mim.training.common.errors import DataError
from hf_mim.training.data import urls
from hf_mim.training.data.bad_images import allowed, name_file


READ = 16  # rows fetched from a shard at once
UNREAD = object()  # in the place of a file that has been counted and not read
DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, pyarrow.ArrowException, ValueError)


class UnreadableShard(DataError):
    """A shard that cannot be read, where the run cannot go on without it."""


@contextmanager
def opening(file: str, kind: str) -> Iterator[None]:
    """Around the opening of shards.

    Raises:
        DataError: they cannot be read as what they are said to be.
    """
    try:
        yield
    except (datasets.exceptions.DatasetGenerationError, tarfile.TarError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, DataError):
            raise cause from None
        where = file.rpartition("/")[0]
        raise DataError(f"cannot read {where} as {kind}: {cause}".partition("\n")[0], where) from None


class Shards:
    """The shards of a stream, each read by itself.

    Of a shard that turns out to be damaged only what can be read is used, in every pass, and it counts against `most`:
    beyond it the run stops. It also stops where reading fails for a reason that may pass (a network, a missing file),
    and where a shard has fewer images than it had: going on would change the order of the images for good.

    Args:
        stream: rows with an undecoded image column.
        column: its name.
        most: `data.max_bad_images`, for shards instead of images.
        single: take the stream as one shard, whatever it is made of.

    Attributes:
        count: how many there are.
        lengths: (count,), images in each shard; -1 where it has not been read to its end yet.
        damaged: (count,), whether it could not be read to its end. Both are shared with the loader's workers.
    """

    def __init__(self, stream, column: str, most: float, single: bool = False):
        self.stream, self.column, self.most = stream, column, most
        self.single, self.count = single, 1 if single else stream.num_shards
        self.lengths = torch.full((self.count,), -1, dtype=torch.int64).share_memory_()
        self.damaged = torch.zeros(self.count, dtype=torch.bool).share_memory_()

    def read(self, index: int) -> Iterator:
        """The files of a shard, and at its end its length is known.

        Raises:
            UnreadableShard: see above.
        """
        length, number, name = int(self.lengths[index]), 0, f"shard {index + 1} of {self.count}"
        rows = self._rest(index, 0) if self.damaged[index] else self._open(index).iter(batch_size=READ)
        while number != length:
            try:
                files = next(rows, {self.column: ()})[self.column]
            except UnreadableShard:
                raise
            except (OSError, *DAMAGE) as error:
                self._note(index, length, error)
                rows, files = self._rest(index, number), ()
                continue
            if not files:
                break
            for file in files[: length - number] if length >= 0 else files:
                # Without a path its place is its name: in messages, and where bad files are counted.
                named = file is not None and file.get("path") is not None
                yield file if named else name_file(file, f"row {number} of {name}")
                number += 1
        if number < length:
            raise UnreadableShard(f"{self.name(index)} had {length} images before and has {number} now: restore it")
        self.lengths[index] = number

    def _note(self, index: int, length: int, error: Exception) -> None:
        """Counts a shard as damaged, where it is that, it has not been whole before, and there are not too many."""
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        what = f"cannot read {self.name(index)}{', which could be read before' if length >= 0 else ''}: {reason}"
        if not is_damage(error) or length >= 0:
            raise UnreadableShard(what) from error
        self.damaged[index] = True
        bad = int(self.damaged.sum())
        if bad > allowed(self.count, self.most):
            found = f"{bad} of {self.count} shards are damaged, more than data.max_bad_images={self.most} allows"
            raise UnreadableShard(f"{what}; {found}") from error

    def _rest(self, index: int, number: int) -> Iterator[dict]:
        """One by one, the rows of a damaged shard that can be read, from `number` on: of a parquet file all row groups
        but the damaged ones, of others what comes before the damage."""
        with self._only_damage(index):
            pieces = [self.stream] if self.single else self._row_groups(index)
            for piece in pieces:
                with self._only_damage(index):
                    for row in piece.iter(batch_size=1):
                        number -= 1
                        if number < 0:
                            yield row

    def _row_groups(self, index: int) -> Iterator:
        pieces = self._open(index).reshard()
        for i in range(pieces.num_shards):
            yield pieces.shard(pieces.num_shards, i)

    @contextmanager
    def _only_damage(self, index: int) -> Iterator[None]:
        """Passes over damage, and over nothing else."""
        try:
            yield
        except UnreadableShard:
            raise
        except (OSError, *DAMAGE) as error:
            if not is_damage(error):
                raise UnreadableShard(f"cannot read {self.name(index)}: {error}".partition("\n")[0]) from error

    def _open(self, index: int):
        return self.stream if self.count == 1 else self.stream.shard(self.count, index)

    def name(self, index: int) -> str:
        """The file of a shard, where `datasets` says it; else its number."""
        source = self._open(index)._ex_iterable
        while hasattr(source, "ex_iterable"):
            source = source.ex_iterable
        lists = [value for value in getattr(source, "kwargs", {}).values() if isinstance(value, list)]
        file = next((value[0] for value in lists if len(value) == 1 and isinstance(value[0], str)), None)
        return urls.masked(file) if file else f"shard {index + 1} of {self.count}"


def is_damage(error: Exception) -> bool:
    """Whether contents are damaged: what the system or a connection says may be gone tomorrow. Where contents are,
    pyarrow raises OSError too, without a number."""
    return isinstance(error, DAMAGE) or (type(error) is OSError and error.errno is None)


class Lane:
    """One of the sequences that a stream's shards are dealt to, pass after pass without end.

    In each pass a permutation drawn from (seed, pass) deals every shard to one lane, and the lanes take turns in having
    one more than others; so between them they give each image once per pass. A lane draws each image from a buffer of
    those read last, as (seed, pass, lane) say.

    Args:
        shards: of the stream.
        number, lanes: which one of how many; at most as many as shards.
        seed: of the run.
        buffer: how many images are held to draw from; 1 shuffles the shards only, 0 nothing.
    """

    def __init__(self, shards: Shards, number: int, lanes: int, seed: int, buffer: int):
        self.shards, self.number, self.lanes, self.seed, self.buffer = shards, number, lanes, seed, buffer

    def rows(self, first: int) -> Iterator[tuple[int, int, object]]:
        """(pass, number in the pass, file) of the images from the lane's number `first` on; numbers in a pass are
        unique over all lanes. Passes and shards of known length that lie before are not read.

        Raises:
            ValueError: there is no image in any shard.
        """
        for epoch in itertools.count():
            order = self.dealt(epoch)
            lengths = self.shards.lengths[order]
            if (lengths < 0).any() or first < lengths.sum():
                for place, file in enumerate(self._pass(epoch, order, first), first):
                    yield epoch, place * self.lanes + self.number, file
                lengths = self.shards.lengths[order]
            elif not self.shards.lengths.any():
                raise NoImages("the data set has no images")
            first = max(0, first - int(lengths.sum()))

    def dealt(self, epoch: int) -> list[int]:
        """The shards of a pass, in the order in which they are read."""
        count = self.shards.count
        order = self._rng(epoch, 0).permutation(count) if self.buffer else np.arange(count)
        return order[(self.number + epoch) % self.lanes :: self.lanes].tolist()

    def _pass(self, epoch: int, order: list[int], first: int) -> Iterator:
        rows, held = Rows(self.shards, order), list[list]()
        drawn = shuffled(rows, held, max(1, self.buffer), self._rng(epoch, self.number + 1))
        if sum(1 for _ in itertools.islice(drawn, first)) == first:
            rows.read(held)
            yield from (row[2] for row in drawn)

    def _rng(self, epoch: int, key: int) -> np.random.Generator:
        # A spawn key, because `sample_rng` draws from the same numbers as entropy.
        return np.random.default_rng(np.random.SeedSequence((self.seed, epoch), spawn_key=(key,)))


class Rows:
    """The rows of some shards one after the other, as lists [shard, number in it, file]. Until `read` is called those
    of shards whose length is known are only counted."""

    def __init__(self, shards: Shards, order: list[int]):
        self.shards, self.order, self.reading = shards, order, False
        self.current: int | None = None  # the shard that is being read
        self.opened: Iterator | None = None

    def __iter__(self):
        for shard in self.order:
            length, number, self.current = int(self.shards.lengths[shard]), 0, shard
            while not self.reading and number < length:
                yield [shard, number, UNREAD]
                number += 1
            files, self.opened = self.opened or enumerate(self.shards.read(shard)), None
            if number != length:
                yield from ([shard, place, file] for place, file in files if place >= number)

    def read(self, waiting: list[list]) -> None:
        """From now on rows are read, and so are those that are waiting."""
        self.reading, unread = True, dict[int, dict[int, list]]()
        for row in waiting:
            if row[2] is UNREAD:
                unread.setdefault(row[0], {})[row[1]] = row
        for shard, rows in unread.items():
            files, last = enumerate(self.shards.read(shard)), max(rows)
            for number, file in files:
                if number in rows:
                    rows[number][2] = file
                if number == last:
                    break
            if shard == self.current:  # the shard that comes next is not opened twice
                self.opened = files


def shuffled(rows, held: list, size: int, rng: np.random.Generator) -> Iterator:
    """Draws each row from `held`, the list of up to `size` rows that were read and not given yet."""
    draws: Iterator[int] = iter(())
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        place = next(draws, None)
        if place is None:
            draws = iter(rng.integers(size, size=1000).tolist())
            place = next(draws)
        row, held[place] = held[place], row
        yield row
    held[:] = [held[i] for i in rng.permutation(len(held))] if size > 1 else held
    while held:
        yield held.pop()


class Window:
    """Rows of a lane of which those to come can be looked at.

    Args:
        rows: an endless iterator of those of a `Lane`.
        first: the number of its first row.
    """

    def __init__(self, rows: Iterator, first: int):
        self.rows, self.first = rows, first
        self.held: deque[tuple] = deque()

    def look(self, number: int) -> Iterator:
        """The rows from `number` on; those before are gone for good."""
        while self.first < number:
            self.held.popleft() if self.held else next(self.rows)
            self.first += 1
        for ahead in itertools.count():
            if ahead == len(self.held):
                rows = list(itertools.islice(self.rows, READ))
                files = urls.read_files([row[-1] for row in rows])  # side by side: it is waiting that takes the time
                self.held.extend((*row[:-1], file) for row, file in zip(rows, files, strict=True))
            yield self.held[ahead]


class NoImages(DataError):
    """There is nothing to train on."""
