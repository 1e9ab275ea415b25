"""A teacher whose maps are computed once per image, for runs without random crops, and blended afterwards."""

from pathlib import Path

from torch import Tensor

from hf_mim import MIMForPreTraining
from hf_mim.modeling.options import pair
from hf_mim.modeling.teachers import teachers_of
from hf_mim.training.trainer.teacher_cache import TeacherCache


CAPACITY = 64_000  # images: the shipped ones, mirrored too


def store_maps(model: MIMForPreTraining, folder: Path, blend: float = 0.0) -> None:
    """Has the teachers of a model's target keep their maps in `folder`, and moves every token by the share `blend`
    towards the mean token of its image; below 0, away from it."""
    size = pair(model.config.image_size)
    for teacher in teachers_of(model.target):
        cache = TeacherCache(teacher, folder, size, model.mim.encoder.target_grid(*size), CAPACITY)

        def maps(pixel_values: Tensor, grid, cache=cache) -> list[Tensor]:
            return [stage.lerp(stage.mean((2, 3), keepdim=True), blend) for stage in cache(pixel_values, grid)]

        teacher.maps = maps  # type: ignore[method-assign]
