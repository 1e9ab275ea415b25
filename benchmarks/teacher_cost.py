"""What a step costs with a teacher, with its kept features (`training.cache_teacher`), and without one.

    python benchmarks/teacher_cost.py [--recipes img2vec_small dtm_small] --out docs/benchmarks.md

One optimizer step of a recipe on shipped images: the teacher asked at each step, its maps read from a file that holds
them all, and the student alone, which is handed maps that are in memory already. The three take turns on the same
batch, and the batch is another one at each round.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from measure import alternate, machine, markdown_table, paired_ratios, parser, quartiles, spread, write_section
from rich.console import Console

from hf_mim.modeling.options import pair
from hf_mim.modeling.teachers import teachers_of
from hf_mim.training.commands.pretrain import set_up
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.trainer.teacher_cache import TeacherCache


ARMS = ("student alone", "kept features", "teacher at each step")


class Steps:
    """Optimizer steps of one recipe, with the maps of its teacher from one of three sources.

    Args:
        batch: images.
        count: how many batches there are.
        folder: where the maps are kept.
    """

    def __init__(self, recipe: str, batch: int, count: int, folder: Path):
        words = [f"training.output_dir={folder / 'run'}", f"data.max_train_images={batch * count}"]
        run = set_up(recipe, [*words, "data.max_eval_images=0"], Console(quiet=True))
        self.model = run.model.train()
        size = pair(self.model.config.image_size)
        collate = MIMCollator(self.model.config, self.model.mask_grid(*size))
        indices = torch.arange(batch * count).split(batch)
        self.batches = [collate(run.splits.train.__getitems__(part.tolist())) for part in indices]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        (self.teacher,) = teachers_of(self.model.target)
        self.maps, grid = self.teacher.maps, self.model.mim.encoder.target_grid(*size)
        self.cache = TeacherCache(self.teacher, folder, size, grid, batch * count)
        self.at_hand = [self.cache(part["pixel_values"], grid) for part in self.batches]
        self.place = 0

    def step(self, arm: str) -> None:
        place, self.place = self.place // len(ARMS) % len(self.batches), self.place + 1
        self.teacher.maps = {
            "student alone": lambda *call: self.at_hand[place],
            "kept features": self.cache,
            # A copy, since a teacher keeps its last batch.
            "teacher at each step": lambda pixel_values, grid: self.maps(pixel_values.clone(), grid),
        }[arm]
        self.optimizer.zero_grad()
        self.model(**self.batches[place]).loss.backward()
        self.optimizer.step()


def main(words: list[str] | None = None) -> list[list]:
    made = parser(__doc__, batch=64, rounds=15)
    made.add_argument("--recipes", nargs="+", default=["img2vec_small", "dtm_small"])
    args, rows = made.parse_args(words), []
    torch.set_num_threads(1)
    for recipe in args.recipes:
        with tempfile.TemporaryDirectory() as folder:
            steps = Steps(recipe, args.batch, min(8, args.rounds), Path(folder))
            arms = {arm: partial(steps.step, arm) for arm in ARMS}
            seconds = alternate(arms, args.rounds, clock=time.process_time)
        each = [spread(quartiles([1000 * value for value in seconds[arm]]), 0) for arm in ARMS]
        times = [spread(paired_ratios(seconds, arm, "student alone")) for arm in ARMS[1:]]
        rows.append([recipe, *each, *times])
    header = ["recipe", *(f"{arm}, ms" for arm in ARMS), *(f"{arm}, times the student" for arm in ARMS[1:])]
    table = markdown_table(header, rows)
    print(table)
    if args.out:
        write_section(
            args.out, "teacher_cost", f"{machine()} Batches of {args.batch}, {args.rounds} rounds.\n\n{table}"
        )
    return rows


if __name__ == "__main__":
    main()
