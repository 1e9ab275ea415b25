"""`model.init_from` with the recipes of a method for one kind of encoder (FCMAE, Pixio, CrossMAE, Hiera), with `adapt`
and its distance to the start, and with `distill`: each goes on with every family of encoders, or says why not."""

import pytest
import torch
from test_adapt import ALL, adam, section, sources, teacher  # noqa: F401  two fixtures among them

from hf_mim import MIMForPreTraining
from hf_mim.training import recipe as recipes
from hf_mim.training.commands.pretrain import make_model
from hf_mim.training.trainer.start import DISTANCES


MASKED = ["model.masking=block", "model.masking_config.ratio=0.4"]
RECIPES = {  # name of the case: the recipe and what is changed of it
    **{name: (name, []) for name in ("fcmae_small", "pixio_small", "crossmae_small", "hiera_small", "adapt")},
    "adapt near its weights": ("adapt", ["model.keep=weights"]),
    "distill_small": ("distill_small", []),
    "distill_small with masks": ("distill_small", MASKED),
}


def why_not(recipe: str, family: str) -> str | None:
    """The words of the refusal, for what does not go together."""
    if recipe == "crossmae_small" and ALL[family][2] != "vit":
        return "drops hidden tokens, which this one does not: set model.decoder_config.prediction_ratio=null"
    if recipe == "fcmae_small" and family == "timm_efficientnet":
        return "keep hidden positions out of BatchNormAct2d"
    if recipe == "fcmae_small" and family == "dinov3_convnext":
        return "mask_style that is not sparse"
    return None


def make(recipe: str, changes: list[str], source: str, teacher) -> tuple[MIMForPreTraining, dict]:  # noqa: F811
    """-> the model as a run makes it, and `model` of its recipe."""
    words = list(changes)
    if recipe == "distill_small":
        words += [f"model.target_config.teachers=[{{teacher: {teacher}, match: interpolate, input_size: 16}}]"]
    made = section(source, recipe, *words)
    model = make_model(made)[0]
    if recipe == "distill_small":
        model.target.fit([torch.randn(8, model.config.num_channels, 64, 64)])
    return model, made


def step(model, optimizer, distance, number: int) -> float:
    torch.manual_seed(number)
    images = torch.randn(2, 3, 64, 64)
    out = model(images, generator=torch.Generator().manual_seed(number))
    loss = out.loss if distance is None else out.loss + distance.weight * distance(model, images, out.bool_masked_pos)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def distance_of(made: dict, start: MIMForPreTraining):
    keep = made.get("keep")
    return None if keep is None else DISTANCES[keep](start, made.get("keep_weight"))


def check_pair(case: str, family: str, source: str, teacher, folder) -> None:  # noqa: F811
    """Two steps that move every weight, a save, a reload bit for bit, and a third step that goes on equally; or the
    refusal."""
    recipe, changes = RECIPES[case]
    if reason := why_not(recipe, family):
        with pytest.raises(ValueError, match=reason):
            make(recipe, changes, source, teacher)
        return
    model, made = make(recipe, changes, source, teacher)
    method = recipes.resolve(recipe, changes)["model"]
    assert all(getattr(model.config, part) == method[part] for part in ("masking", "decoder", "target"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, distance = adam(model.train()), distance_of(made, model)
    losses = [step(model, optimizer, distance, number) for number in (1, 2)]
    assert all(torch.tensor(losses).isfinite())
    unmoved = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(before[name], p)]
    assert not unmoved, unmoved
    model.save_pretrained(folder)
    again = MIMForPreTraining.from_pretrained(folder).train()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    resumed, reloaded = adam(again), {name: value.clone() for name, value in again.state_dict().items()}
    resumed.load_state_dict(optimizer.state_dict())
    again.load_state_dict(before)  # the distance is that to the start, as a resumed run makes it
    kept = distance_of(made, again)
    again.load_state_dict(reloaded)
    assert step(again, resumed, kept, 3) == step(model, optimizer, distance, 3)


DIAGONAL = [("fcmae_small", "convnextv2"), ("fcmae_small", "dinov3_convnext"), ("pixio_small", "pixio")]
DIAGONAL += [("crossmae_small", "dinov3"), ("crossmae_small", "swin"), ("hiera_small", "timm_vit")]
DIAGONAL += [("adapt", "clip"), ("adapt", "resnet"), ("adapt near its weights", "swin")]
DIAGONAL += [("distill_small", "aimv2"), ("distill_small with masks", "timm_efficientnet")]


@pytest.mark.parametrize(("case", "family"), DIAGONAL)
def test_case_and_family(case, family, sources, teacher, tmp_path):  # noqa: F811
    check_pair(case, family, sources(family), teacher, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("case", RECIPES)
def test_every_case_with_every_family(case, family, sources, teacher, tmp_path):  # noqa: F811
    check_pair(case, family, sources(family), teacher, tmp_path)
