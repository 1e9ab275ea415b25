"""Training on a data set that is read as it comes."""

import zlib

import datasets
import numpy as np
import torch

from hf_mim.modeling.configuration_mim import MIMConfig, pair
from hf_mim.training import sources
from hf_mim.training.decoding import allowed, too_many
from hf_mim.training.sources import DataArguments
from hf_mim.training.transforms import UNIFORMS, ImageBatch, crop_batch, crop_boxes, flip_batch, resize, sample_rng


READ = 16  # rows fetched from the stream at once
SETTLED = 1000  # images of which a share of bad ones says something
BAD_SLOTS = 2**20  # a bad file takes one by its checksum: workers need no lock, and two in one slot are rare


class StreamedImages(torch.utils.data.IterableDataset):
    """As `MIMDataset`, over and over without end. The order of a pass follows from (seed, pass), crops, flips and masks
    from (seed, pass, position in the pass), whatever the number of workers, so that `seek` goes on exactly where
    another process stopped.

    An image that cannot be decoded is replaced by the next one that can.

    Args:
        stream: rows with an undecoded image column.
        config, data, seed: as of `MIMDataset`.

    Attributes:
        batch_size: of the loader, which several workers need to know to take turns.
    """

    def __init__(self, stream, config: MIMConfig, data: DataArguments, seed: int = 0):
        stream = stream if stream.features else stream._resolve_features()
        self.image_column, _ = sources.find_columns(stream.features or {}, data)
        stream = stream.select_columns([self.image_column])
        self.stream = stream.cast_column(self.image_column, datasets.Image(decode=False))
        self.config, self.data, self.seed, self.batch_size, self.start = config, data, seed, 1, 0
        # Shared with the loader's workers: the length of a pass once it is known, and which files were bad.
        self._length = torch.zeros((), dtype=torch.int64).share_memory_()
        self._bad = torch.zeros(BAD_SLOTS, dtype=torch.bool).share_memory_()

    @property
    def bad_count(self) -> int:
        return int(self._bad.sum())

    def position(self, taken: int) -> dict[str, int]:
        """What `seek` needs after `taken` more images have been trained on."""
        return {"images": self.start + taken, "length": int(self._length)}

    def seek(self, images: int, length: int = 0) -> None:
        """Begins after so many images; with the length of a pass, if it is known, whole passes need not be read."""
        self.start = images
        self._length.fill_(length)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        waiting, seen, bad = [], set(), set()  # waiting: places of bad images, which the next good one will serve
        hopeful = False
        for count, epoch, index, file in self._rows():
            mine = count // self.batch_size % workers == number
            if not mine and not waiting:
                continue
            try:
                seen.add(index)
                image = torch.from_numpy(sources.decode(file, self.config.num_channels))[None]
                hopeful = True
            except ValueError as error:
                if mine:
                    waiting.append((epoch, index))
                    slot = zlib.crc32((file["path"] or "").encode() + (file["bytes"] or b"")) % BAD_SLOTS
                    hopeless = not hopeful and slot in bad  # a whole pass, and not one good image
                    self._bad[slot] = True
                    bad.add(slot)
                    if hopeless or len(bad) > allowed(max(len(seen), SETTLED), self.data.max_bad_images):
                        of = f"the first {len(seen)} images"
                        raise too_many(len(bad), of, self.data.max_bad_images, str(error)) from None
                continue
            for place in [*waiting, *([(epoch, index)] if mine else [])]:
                yield self._cut(image, *place)
            waiting = []

    def _rows(self):
        """(images since the start, pass, position in the pass, file) of every image from `start` on."""
        length = int(self._length)
        epoch, skip = divmod(self.start, length) if length else (0, self.start)
        count = 0
        while True:
            index = -1
            for index, file in enumerate(self._files(epoch)):
                if index >= skip:
                    yield count, epoch, index, file
                    count += 1
            if index < 0:
                raise ValueError("the data set has no images")
            self._length.fill_(index + 1)
            epoch, skip = epoch + 1, max(0, skip - index - 1)

    def _files(self, epoch: int):
        # Not by `set_epoch`: its number is shared by the loader's workers, which need not be in the same pass.
        seed = np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]
        size = self.data.shuffle_buffer
        stream = self.stream.shuffle(seed=int(seed), buffer_size=size) if size else self.stream
        # In batches: iterating one by one, a stream would divide its files among the loader's workers, each of which
        # would then not know where in the stream it is.
        for rows in stream.iter(batch_size=READ):
            yield from rows[self.image_column]

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
