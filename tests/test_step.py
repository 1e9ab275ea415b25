"""A training step does not wait for the device, and compiles once."""

import contextlib

import numpy as np
import pytest
import torch
from helpers import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from hf_mim import MIMForPreTraining, MIMModel
from hf_mim.modeling.masking import sample_masks


# Each makes the host wait until the device has a result, gives a tensor whose size only the device knows, or brings
# numbers of the host (lift_fresh), which a GPU takes when it has done everything else.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default", "lift_fresh")
TARGETS = {
    "pixel": {},
    "hog": {},
    "frequency": {},
    "moving_average": {},
    "token_morphing": {"features": {"name": "pixel"}},
}


class CountWaiting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        by_mask = "index" in name and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for arg in args if isinstance(arg, list) for i in arg
        )
        if by_mask or any(word in name for word in WAITING):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def make_step(target="pixel", **changes):
    torch.manual_seed(0)
    config = tiny_config(image_size=32, target=target, target_config=TARGETS[target], **changes)
    model = MIMForPreTraining(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    grid = model.mask_grid(32, 32)

    def step(network, seed: int, counter=None):
        torch.manual_seed(seed)
        pixels = torch.randn(2, 3, 32, 32)
        masks = sample_masks(config, grid, [np.random.default_rng(seed + i) for i in range(2)])
        with counter or contextlib.nullcontext():
            network(
                pixel_values=pixels, bool_masked_pos=masks, generator=torch.Generator().manual_seed(seed)
            ).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return model, step


@pytest.fixture
def teacher_options(tmp_path):
    teacher = tiny_config(image_size=32, image_mean=[0.4] * 3)
    MIMModel(teacher, add_pooling_layer=False).save_pretrained(tmp_path / "teacher")
    return {"teacher": str(tmp_path / "teacher"), "feature_dims": [teacher.encoder_config["hidden_size"]]}


def test_the_counter_finds_what_waits():
    with CountWaiting() as counter:
        values = torch.arange(4.0)
        values.sum().item()
        values[values > 1]
        values.new_tensor([1.0])
    assert len(counter.found) >= 3


@pytest.mark.parametrize("style", ["drop", "token", "add"])
@pytest.mark.parametrize("target", list(TARGETS))
def test_a_step_does_not_wait_for_the_device(target, style):
    model, step = make_step(target, encoder_config={"mask_style": style})
    step(model, 0)  # tables are made in the first step
    # The sizes of the groups are drawn on the host, from its own generator: two numbers in each of two schedules.
    drawn = ["aten._local_scalar_dense.default"] * 4 if target == "token_morphing" else []
    counter = CountWaiting()
    step(model, 1, counter)
    assert counter.found == drawn


@pytest.mark.parametrize("target, style", [("pixel", "drop"), ("pixel", "token"), ("token_morphing", "token")])
def test_a_compiled_step_is_not_compiled_again(target, style):
    model, step = make_step(target, encoder_config={"mask_style": style})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(2):
        step(compiled, seed)
    before = [parameter.clone() for parameter in model.parameters()]
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(2, 5):
            step(compiled, seed)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_teacher_does_not_make_a_step_wait(teacher_options):
    model = MIMForPreTraining(tiny_config(image_size=32, target="teacher_feature", target_config=teacher_options))
    pixels, counter = torch.randn(2, 3, 32, 32), CountWaiting()
    masks = sample_masks(model.config, model.mask_grid(32, 32), [np.random.default_rng(i) for i in range(2)])
    model(pixel_values=pixels, bool_masked_pos=masks)  # loads the teacher
    with counter:
        model.target.targets(pixels + 1, model.mask_grid(32, 32))
    assert counter.found == []


def test_a_compiled_student_learns_from_every_batch_what_its_teacher_says(teacher_options):
    """The teacher keeps the maps of the last batch, which a compiled step must not take for those of the next."""
    torch.manual_seed(0)
    config = tiny_config(image_size=32, target="teacher_feature", target_config=teacher_options)
    model = MIMForPreTraining(config).eval()
    masks = sample_masks(model.config, model.mask_grid(32, 32), [np.random.default_rng(i) for i in range(2)])
    batches = [torch.randn(2, 3, 32, 32) for _ in range(3)]
    plain = [float(model(pixels, bool_masked_pos=masks).loss) for pixels in batches]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    model.target.teacher.compile()
    model.target.teacher.model().encoder.compile(backend="aot_eager")
    losses = [float(compiled(pixels, bool_masked_pos=masks).loss) for pixels in batches]
    assert len({round(loss, 4) for loss in plain}) == 3
    assert losses == pytest.approx(plain, rel=1e-4)
