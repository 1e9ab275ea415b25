"""`StreamedImages`: training on a data set that is read in order, shard by shard, without an index."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import datasets
import numpy as np
import torch

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.options import pair
from hf_mim.modeling.resizing import fit_whole
from hf_mim.training.common.errors import DataError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.bad_images import BAD_SLOTS, MESSAGE_BYTES, BadFiles, BadImageReport, get_message
from hf_mim.training.data.base import ImageDataset
from hf_mim.training.data.batches import ImageBatch
from hf_mim.training.data.color import check_jitter, jitter_colors
from hf_mim.training.data.columns import find_columns
from hf_mim.training.data.decoding import Decoder
from hf_mim.training.data.shards import Lane, Shards, Window
from hf_mim.training.data.transforms import UNIFORMS, crop_batch, crop_boxes, flip_batch, sample_rng


class StreamedImages(ImageDataset, torch.utils.data.IterableDataset):
    """As `MIMDataset`, over and over without end, for the workers of the loaders of one or more processes.

    The images are numbered, over all processes. Blocks of them, of the size of a loader's batch, come from the lanes
    (see `shards`) in turns, and each worker gives the images of its own batches, for which it opens the lanes
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
        column, _ = find_columns(stream.features or {}, data)
        stream = stream.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        if data.max_train_images:
            # At random as far as a stream allows: in a random order of its shards, through the buffer.
            # One shard at a time: `datasets` reads several side by side in threads and sleeps 5 s whenever they end.
            options = {"buffer_size": data.shuffle_buffer, "max_buffer_input_shards": 1}
            shuffled = stream.shuffle(seed, **options) if data.shuffle_buffer else stream
            stream = shuffled.take(data.max_train_images)
        self.shards = Shards(stream, column, data.max_bad_images, single=bool(data.max_train_images))
        self.config, self.data, self.seed = config, data, seed
        check_jitter(data.color_jitter, config.num_channels)
        self.decode = Decoder(config, data)
        self.eval_crop = config.eval_crop if data.eval_crop is None else data.eval_crop
        self.start, self.lanes, self.block = 0, 0, 0
        self.batch_size, self.process, self.processes = 1, 0, 1
        # Shared with the loader's workers: which files were bad.
        self._bad = torch.zeros(BAD_SLOTS, dtype=torch.bool).share_memory_()
        self._first_bad = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8).share_memory_()

    def bad_images(self) -> BadImageReport:
        return BadImageReport(int(self._bad.sum()), get_message(self._first_bad))

    def damaged_shards(self) -> list[str]:
        damaged = self.shards.damaged.nonzero().flatten().tolist()
        lengths = [max(0, int(self.shards.lengths[i])) for i in damaged]
        return [f"{self.shards.name(i)} is damaged: {n} of its images can be read" for i, n in zip(damaged, lengths)]

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
            raise DataError(
                "this checkpoint of a stream was saved by an older version of hf_mim, which read the images in another "
                "order: go on with that version, or begin a new run from its weights, by model.init_from"
            )
        count, lengths = self.shards.count, torch.tensor(position["lengths"], dtype=torch.int64)
        if len(lengths) != count:
            raise DataError(f"the data set has {count} shards now and had {len(lengths)} at the checkpoint")
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
        other.data = replace(self.data, crop_scale=None, horizontal_flip=False, color_jitter=0.0)
        other.start, other.lanes, other.block, other.process, other.processes = 0, 1, 1, 0, 1
        return other

    # ---- images ----------------------------------------------------------------------------------------------------
    def __iter__(self) -> Iterator[ImageBatch]:
        if not self.lanes:
            self.arrange(self.batch_size)
        windows: dict[int, Window] = {}
        bad = BadFiles(self._bad, self._first_bad, self.data.max_bad_images)
        for number in self._mine():
            block, within = divmod(number, self.block)
            turn, lane = divmod(block, self.lanes)
            place = turn * self.block + within
            if lane not in windows:
                rows = Lane(self.shards, lane, self.lanes, self.seed, self.data.shuffle_buffer).rows(place)
                windows[lane] = Window(rows, place)
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

    def _image(self, rows: Iterator, bad: BadFiles) -> ImageBatch:
        place = None
        for epoch, index, file in rows:
            if place is None:
                place = epoch, index
                bad.seen[epoch] += 1
            try:
                image = torch.from_numpy(self.decode(file))[None]
            except ValueError as error:
                bad.add(file, epoch, str(error))
                continue
            bad.any_good = True
            return self._cut(image, *place)
        raise AssertionError("a lane has no end")

    def _cut(self, image: torch.Tensor, epoch: int, index: int) -> ImageBatch:
        size, data = pair(self.config.image_size), self.data
        rng = sample_rng(self.seed, epoch, index)
        uniforms = rng.random(UNIFORMS)[None]
        sizes = np.array([image.shape[-2:]])
        if data.crop_scale is None:
            image = fit_whole(image, size, self.eval_crop)
        else:
            boxes = crop_boxes(uniforms, sizes, size, data.crop_scale)
            image = crop_batch(image, boxes, size, data.interpolation)
        image = flip_batch(image, uniforms[:, -1] < 0.5) if data.horizontal_flip else image
        return ImageBatch(jitter_colors(image, [rng], data.color_jitter) if data.color_jitter else image, [rng])
