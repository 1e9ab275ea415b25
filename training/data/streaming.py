"""Training on a data set that is read as it comes."""

import copy
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import datasets
import numpy as np
import torch

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.options import pair
from hf_mim.training.data import sources
from hf_mim.training.data.decoding import allowed, too_many
from hf_mim.training.data.shards import Lane, Shards, Window
from hf_mim.training.data.sources import DataArguments
from hf_mim.training.data.transforms import UNIFORMS, ImageBatch, crop_batch, crop_boxes, flip_batch, resize, sample_rng


SETTLED = 1000  # images of which a share of bad ones says something
HOPELESS = 3  # passes without one good image
BAD_SLOTS = 2**20  # a bad file takes one by its checksum: workers need no lock, and two in one slot are rare


class StreamedImages(torch.utils.data.IterableDataset):
    """As `MIMDataset`, over and over without end, for the workers of the loaders of one or more processes.

    The images are numbered, over all processes. Blocks of them, of the size of a loader's batch, come from the lanes
    (see `training.shards`) in turns, and each worker gives the images of its own batches, for which it opens the lanes
    that they come from: one, where there are as many shards as workers and the run has not changed its number of them.
    Where there are fewer shards, several workers read a lane and decode only what is theirs.

    Which image has which number follows from the seed, the number of lanes and the size of a block alone; crops, flips
    and masks from (seed, pass, number in the pass). `arrange` chooses lanes and block when a run begins, `seek` takes
    those of a checkpoint: so the order stays what it was, whatever the number of workers and processes is now.

    An image that cannot be decoded is replaced by the next one of its lane that can.

    Args:
        stream: rows with an undecoded image column.
        config, data, seed: as of `MIMDataset`.
    """

    def __init__(self, stream, config: MIMConfig, data: DataArguments, seed: int = 0):
        stream = stream if stream.features else stream._resolve_features()
        column, _ = sources.find_columns(stream.features or {}, data)
        stream = stream.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        stream = stream.take(data.max_train_images) if data.max_train_images else stream
        self.shards = Shards(stream, column, data.max_bad_images, single=bool(data.max_train_images))
        self.config, self.data, self.seed = config, data, seed
        self.start, self.lanes, self.block = 0, 0, 0
        self.batch_size, self.process, self.processes = 1, 0, 1
        # Shared with the loader's workers: which files were bad.
        self._bad = torch.zeros(BAD_SLOTS, dtype=torch.bool).share_memory_()

    @property
    def bad_count(self) -> int:
        return int(self._bad.sum())

    def damaged(self) -> list[str]:
        """What is to be said of each shard of which not all can be read."""
        found = self.shards.damaged.nonzero().flatten().tolist()
        lengths = [int(self.shards.lengths[i]) for i in found]
        return [
            f"{self.shards.name(i)} is damaged: {max(0, n)} of its images can be read" for i, n in zip(found, lengths)
        ]

    # ---- where a run is --------------------------------------------------------------------------------------------
    def arrange(self, batch_size: int, process: int = 0, processes: int = 1, workers: int = 0) -> None:
        """Says who will read: the size of the loaders' batches, the number of this process, and how many processes
        there are with how many workers each."""
        self.batch_size, self.process, self.processes = batch_size, process, processes
        if not self.lanes:
            consumers = processes * max(1, workers)
            most = min(consumers, self.shards.count)
            # A divisor: else every worker would need every lane.
            self.lanes = max(number for number in range(1, most + 1) if consumers % number == 0)
            self.block = batch_size

    def position(self, taken: int) -> dict:
        """What `seek` needs after `taken` more images have been trained on, by all processes."""
        return {
            "images": self.start + taken,
            "lanes": self.lanes,
            "block": self.block,
            "lengths": self.shards.lengths.tolist(),
            "damaged": self.shards.damaged.nonzero().flatten().tolist(),
        }

    def seek(self, position: dict) -> None:
        """Goes on at a `position`.

        Raises:
            ValueError: it is that of an older version, or of another stream.
        """
        if "lanes" not in position:
            raise ValueError(
                "this checkpoint of a stream is of an older version of hf_mim, whose order of the images is no more: "
                "go on with that version, or begin a new run from its weights, by model.init_from"
            )
        count, lengths = self.shards.count, torch.tensor(position["lengths"], dtype=torch.int64)
        if len(lengths) != count:
            raise ValueError(f"the data set has {count} shards now and had {len(lengths)} at the checkpoint")
        self.start, self.lanes, self.block = position["images"], position["lanes"], position["block"]
        self.shards.lengths.copy_(lengths)
        self.shards.damaged.zero_()[position["damaged"]] = True

    def gather(self, device: torch.device) -> None:
        """Brings together what the processes know of the shards; all of them must call it."""
        if self.processes > 1:
            for known in (self.shards.lengths, self.shards.damaged):
                everyone = known.to(device, torch.int64, copy=True)
                torch.distributed.all_reduce(everyone, torch.distributed.ReduceOp.MAX)
                known.copy_(everyone)

    def without_augmentation(self) -> "StreamedImages":
        """The same images, whole, from the first one and for one reader."""
        other = copy.copy(self)
        other.data = replace(self.data, crop_scale=None, horizontal_flip=False)
        other.start, other.lanes, other.block, other.process, other.processes = 0, 1, 1, 0, 1
        return other

    # ---- images ----------------------------------------------------------------------------------------------------
    def __iter__(self) -> Iterator[ImageBatch]:
        if not self.lanes:
            self.arrange(self.batch_size)
        windows, bad = {}, BadFiles(self._bad, self.data.max_bad_images)
        for number in self._mine():
            block, within = divmod(number, self.block)
            turn, lane = divmod(block, self.lanes)
            place = turn * self.block + within
            if lane not in windows:
                found = Lane(self.shards, lane, self.lanes, self.seed, self.data.shuffle_buffer)
                windows[lane] = Window(found.rows(place), place)
            yield self._image(windows[lane].look(place), bad)

    def _mine(self) -> Iterator[int]:
        """The numbers of the images that this worker of this process gives."""
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        batch = self.process + self.processes * number
        while True:
            first = self.start + batch * self.batch_size
            yield from range(first, first + self.batch_size)
            batch += self.processes * workers

    def _image(self, rows: Iterator, bad: "BadFiles") -> ImageBatch:
        place = None
        for epoch, index, file in rows:
            if place is None:
                place = epoch, index
                bad.seen[epoch] += 1
            try:
                image = torch.from_numpy(sources.decode(file, self.config.num_channels))[None]
            except ValueError as error:
                bad.add(file, epoch, str(error))
                continue
            bad.hopeful = True
            return self._cut(image, *place)

    def _cut(self, image: torch.Tensor, epoch: int, index: int) -> ImageBatch:
        size, data = pair(self.config.image_size), self.data
        rng = sample_rng(self.seed, epoch, index)
        uniforms = rng.random(UNIFORMS)[None]
        sizes = np.array([image.shape[-2:]])
        if data.crop_scale is None:
            image = resize(image, size)
        else:
            image = crop_batch(image, crop_boxes(uniforms, sizes, size, data.crop_scale), size)
        return ImageBatch(flip_batch(image, uniforms[:, -1] < 0.5) if data.horizontal_flip else image, [rng])


class BadFiles:
    """What one worker has found that cannot be decoded.

    Args:
        slots: (BAD_SLOTS,), of all workers.
        most: `data.max_bad_images`.

    Attributes:
        seen: how many images were looked at, by pass.
        hopeful: whether one of them was good.
    """

    def __init__(self, slots: torch.Tensor, most: float):
        self.slots, self.most, self.seen, self.hopeful, self.found = slots, most, Counter(), False, set()

    def add(self, file, epoch: int, error: str) -> None:
        """Raises:
        TooManyBadImages: that was one too many, or there is no good one.
        """
        file = file or {}
        slot = zlib.crc32((file.get("path") or "").encode() + (file.get("bytes") or b"")) % BAD_SLOTS
        self.slots[slot] = True
        self.found.add(slot)
        seen = max(self.seen.values())
        hopeless = not self.hopeful and epoch >= min(self.seen) + HOPELESS
        if hopeless or len(self.found) > allowed(max(seen, SETTLED), self.most):
            raise too_many(len(self.found), f"the first {seen} images", self.most, error) from None
