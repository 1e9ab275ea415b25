"""What each reader of a stream reads: shards dealt to lanes against every reader reading everything.

    python benchmarks/stream_reading.py --out docs/scaling.md

Eight WebDataset shards of JPEG files, read for one pass by four readers (processes times workers), one after the other
in this process; each gives its quarter of the images, decoded. Bytes are those that the process asks the system for
(`rchar` of /proc/self/io, Linux only), and time is the processor's. In one lane each reader reads the whole stream and
decodes its share, as readers without shards of their own must. Then what is read before the first image of a run that
goes on late in a pass, by a reader that does not know how long the shards are, and by one that does. The shuffle buffer
holds a tenth of a shard, as 1,000 of 10,000 images would.
"""

import io
import itertools
import tarfile
import tempfile
import time
from pathlib import Path

from input_pipeline import make_jpegs
from measure import markdown_table, parser, write_section

from hf_mim import MIMConfig
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.pretraining import load_splits


SHARDS, READERS, BATCH = 8, 4, 32


def write_shards(folder: Path, images: int) -> None:
    files = make_jpegs(40)
    for number in range(SHARDS):
        with tarfile.open(folder / f"train-{number:02}.tar", "w") as archive:
            for i in range(images):
                entry, content = tarfile.TarInfo(f"{number:02}{i:06}.jpg"), files[i % len(files)]
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def reading(
    folder: Path, buffer: int, lengths: list[int], reader: int, lanes: int, first: int, count: int
) -> tuple[float, float]:
    """MB read and seconds of the processor for `count` images of one reader, from the stream's image `first` on."""
    data = DataArguments(dataset=str(folder), streaming=True, crop_scale=[0.2, 1.0], shuffle_buffer=buffer)
    stream = load_splits(data, MIMConfig()).train
    stream.arrange(BATCH, process=reader, processes=READERS)
    stream.seek({"images": first, "lanes": lanes, "block": BATCH, "lengths": lengths, "damaged": []})
    before, start = read_so_far(), time.process_time()
    assert len(list(itertools.islice(stream, count))) == count
    return (read_so_far() - before) / 1e6, time.process_time() - start


def main(words: list[str] | None = None) -> list[list]:
    arguments = parser(__doc__, images=(250, "in each shard")).parse_args(words)
    images, rows = arguments.images, []
    late = int(0.95 * SHARDS * images) // (READERS * BATCH) * READERS * BATCH
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, images)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        for what, known, *where in (
            ("a pass, one lane", False, 1, 0, SHARDS * images // READERS),
            ("a pass, four lanes", False, READERS, 0, SHARDS * images // READERS),
            ("going on at 95% of a pass, one lane, lengths not known", False, 1, late, 1),
            ("one lane, lengths known", True, 1, late, 1),
            ("four lanes, lengths not known", False, READERS, late, 1),
            ("four lanes, lengths known", True, READERS, late, 1),
        ):
            lengths = [images if known else -1] * SHARDS
            found = [reading(folder, images // 10, lengths, reader, *where) for reader in range(READERS)]
            read, seconds = (sum(part) / READERS for part in zip(*found, strict=True))
            rows.append([what, f"{read:.1f}", f"{read / size:.2f}", f"{READERS * read / size:.2f}", f"{seconds:.2f}"])
    header = ["", "MB a reader", "of the stream", "all readers, of the stream", "processor, s a reader"]
    text = f"{SHARDS} shards, {size:.0f} MB together, {READERS} readers.\n\n{markdown_table(header, rows)}"
    print(text)
    if arguments.out:
        write_section(arguments.out, "stream_reading", text)
    return rows


if __name__ == "__main__":
    main()
