"""Starting from encoders that others trained (`model.init_from`): each family of transformers and timm gives its own
features before the first step, trains with each recipe that goes with it, and goes back to its own class."""

import json

import pytest
import timm
import torch
import transformers
from helpers import DECODER_OPTIONS, perturb, tiny_config
from safetensors.torch import save_file

from hf_mim import MIMForPreTraining, MIMModel
from hf_mim.conversion import export
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import start_model, starting_encoder


TOLERANCE = {"rtol": 1e-6, "atol": 1e-5}  # some features reach 11, where float32 ends before 1e-6
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
WIDE = {**VIT, "intermediate_size": 32}
MAPS = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1]}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 8, "image_size": 64}
RESNET = {**MAPS, "embedding_size": 8, "layer_type": "basic"}
BEIT = {**WIDE, "use_relative_position_bias": True}
GATED = {**WIDE, "use_gated_mlp": True, "hidden_act": "silu"}
# family: its class in transformers, the options of its config, and our encoder that takes its weights
FAMILIES = {
    "vit": ("ViT", WIDE, "vit"),
    "deit": ("DeiT", WIDE, "vit"),
    "beit": ("Beit", BEIT, "vit"),
    "data2vec": ("Data2VecVision", {**WIDE, "use_shared_relative_position_bias": True}, "vit"),
    "dinov2": ("Dinov2", VIT, "vit"),
    "dinov2_registers": ("Dinov2WithRegisters", {**VIT, "use_swiglu_ffn": True}, "vit"),
    "dinov3": ("DINOv3ViT", {**WIDE, "num_register_tokens": 2}, "vit"),
    "dinov3_gated": ("DINOv3ViT", GATED, "vit"),
    "clip": ("CLIPVision", WIDE, "vit"),
    "clip_gelu_new": ("CLIPVision", {**WIDE, "hidden_act": "gelu_new"}, "native"),
    "siglip": ("SiglipVision", WIDE, "vit"),
    "vit_mae": ("ViTMAE", {**WIDE, "mask_ratio": 0.0}, "vit"),
    "ijepa": ("IJepa", WIDE, "vit"),
    "pixio": ("Pixio", {**VIT, "n_cls_tokens": 3}, "vit"),
    "aimv2": ("Aimv2Vision", WIDE, "native"),
    "swin": ("Swin", SWIN, "native"),
    "resnet": ("ResNet", RESNET, "convnet"),
    "convnext": ("ConvNext", MAPS, "convnet"),
    "convnextv2": ("ConvNextV2", MAPS, "convnet"),
    "dinov3_convnext": ("DINOv3ConvNext", MAPS, "convnet"),
}
TIMM_VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 16, "img_size": 64}
TIMM = {
    "timm_vit": ("vit_tiny_patch16_224", TIMM_VIT, "vit"),
    "timm_clip": ("vit_base_patch16_clip_quickgelu_224", TIMM_VIT, "vit"),
    "timm_registers": ("vit_tiny_patch16_224", {**TIMM_VIT, "reg_tokens": 2, "init_values": 0.1}, "vit"),
    "timm_resnet": ("resnet18", {"channels": [8, 12, 16, 24], "layers": [1, 1, 1, 1]}, "convnet"),
    "timm_efficientnet": ("test_efficientnet", {}, "convnet"),
}
ALL = {**FAMILIES, **TIMM}

# In the fast tests: a family of each encoder and of each way of renaming.
FAST = {"beit", "dinov3", "clip", "swin", "dinov3_convnext", "timm_vit"}
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ALL]


def library_model(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if family in TIMM:
        name, options, _ = TIMM[family]
        return perturb(timm.create_model(name, num_classes=0, **options), 0.1).eval()
    name, options, _ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**options)
    return perturb(getattr(transformers, f"{name}Model")(config), 0.1).eval()


def save(family: str, folder) -> str:
    """As the library saves it."""
    model = library_model(family)
    if family not in TIMM:
        model.save_pretrained(folder)
        return str(folder)
    name, options, _ = TIMM[family]
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    described = {"architecture": name, "num_classes": 0, "model_args": options}
    described["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 64, 64]}
    (folder / "config.json").write_text(json.dumps(described))
    return str(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """family -> its folder, made when it is asked for."""
    root, made = tmp_path_factory.mktemp("sources"), {}

    def source(family: str) -> str:
        if family not in made:
            made[family] = save(family, root / family)
        return made[family]

    return source


@torch.no_grad()
def own_features(model, images: torch.Tensor) -> torch.Tensor:
    """What a library's model gives, as tokens behind its last norm."""
    if not isinstance(model, transformers.PreTrainedModel):
        # Behind its last stage an EfficientNet has a layer that counts as its head here.
        has_head = hasattr(model, "conv_head")
        tokens = model.forward_intermediates(images, intermediates_only=True)[-1] if has_head else None
        tokens = tokens if has_head else model.forward_features(images)
    else:
        kind = model.config.model_type
        patches = (images.shape[2] // 16) * (images.shape[3] // 16)
        noise = {"noise": torch.arange(float(patches)).expand(len(images), -1)} if kind == "vit_mae" else {}
        tokens = model(images, **noise).last_hidden_state
        if kind == "clip_vision_model":  # its class norms what it pools alone
            tokens = model.post_layernorm(tokens)
        if kind == "dinov3_convnext":  # the mean comes first
            tokens = tokens[:, 1:]
    return tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens


# ---- the features of the source ------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", EACH)
def test_the_features_before_the_first_step_are_those_of_the_source(family, sources):
    start = starting_encoder(sources(family))
    assert start.fields["encoder"] == ALL[family][2]
    images = torch.randn(2, 3, 64, 64)
    expected = own_features(library_model(family), images)
    assert expected.std() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(start.model()(images).last_hidden_state, expected, **TOLERANCE)
        model, lines = start_model(section(sources(family), "quick"))
        torch.testing.assert_close(model.eval().mim(images).last_hidden_state, expected, **TOLERANCE)
    assert lines[0].startswith(f"start: {sources(family)}, ") and ("as its own class" in lines[0]) == (
        ALL[family][2] == "native"
    )


def section(source: str, recipe: str, *overrides: str) -> dict:
    """`model` of a recipe with this start, at the size of the sources, with small decoders."""
    changes = ["model.image_size=64", f"model.init_from={source}", *overrides]
    resolved = recipes.resolve(recipe, changes)["model"]
    decoder = resolved.get("decoder_config") or {}
    resolved["decoder_config"] = {name: DECODER_OPTIONS.get(name, value) for name, value in decoder.items()}
    return resolved


def test_the_vision_tower_of_a_model_of_images_and_text(tmp_path):
    text = {name: WIDE[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    torch.manual_seed(0)
    both = perturb(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=WIDE)), 0.1).eval()
    both.save_pretrained(tmp_path)
    start, images = starting_encoder(str(tmp_path)), torch.randn(2, 3, 64, 64)
    expected = both.vision_model.post_layernorm(both.vision_model(images).last_hidden_state)
    torch.testing.assert_close(start.model()(images).last_hidden_state, expected, **TOLERANCE)
    assert any("the text tower" in note for note in start.notes)


@pytest.mark.parametrize("family", ["vit", "beit", "dinov3", "clip_gelu_new", "resnet"])
def test_another_image_size_keeps_the_features_at_the_own_size(family, sources):
    model, lines = start_model(section(sources(family), "quick", "model.image_size=[96, 64]"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.eval().mim(images).last_hidden_state
        assert model(torch.randn(2, 3, 96, 64)).loss.isfinite()
    torch.testing.assert_close(features, own_features(library_model(family), images), **TOLERANCE)
    told = any("trained at 64x64 pixels" in line for line in lines)
    assert told == (family not in ("dinov3", "resnet"))  # which have no positions of a grid


def test_fixed_positions_of_our_own_checkpoints_stay_those_of_their_grid(tmp_path):
    saved = MIMModel(tiny_config(image_size=16)).eval()
    saved.save_pretrained(tmp_path)
    model, _ = start_model(section(str(tmp_path), "quick", "model.image_size=24"))
    images = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        expected = saved(images).last_hidden_state
        torch.testing.assert_close(model.eval().mim(images).last_hidden_state, expected, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "more")
    again, _ = start_model(section(str(tmp_path / "more"), "quick", "model.image_size=32"))
    with torch.no_grad():
        torch.testing.assert_close(again.eval().mim(images).last_hidden_state, expected, rtol=0, atol=0)


# ---- recipes and families ------------------------------------------------------------------------------------------
RECIPES = [
    *("quick", "maskfeat_small", "a2mim_vit_small", "a2mim_resnet18_small", "data2vec_small", "dtm_small"),
    *("img2vec_small", "maskdistill_small", "simmim", "simmim_swin", "spark_small"),
]


def why_not(recipe: str, family: str) -> str | None:
    """The words of the refusal, for what does not go together."""
    kind = ALL[family][2]
    if recipe == "data2vec_small" and kind != "vit":
        return "choose that encoder"
    if recipe == "spark_small" and kind != "convnet":
        return "with mask_style 'sparse'"
    if recipe == "spark_small" and family == "timm_efficientnet":
        return "keep hidden positions out of BatchNormAct2d"
    if recipe == "spark_small" and family == "dinov3_convnext":
        return "mask_style that is not sparse"
    return None


def overrides_of(recipe: str, teacher) -> list[str]:
    if recipe == "dtm_small":
        features = f"{{name: teacher_feature, teacher: {teacher}, match: interpolate, input_size: 16}}"
        return [f"model.target_config={{features: {features}}}"]
    if recipe in ("img2vec_small", "maskdistill_small"):
        return [f"model.target_config={{teacher: {teacher}, match: interpolate, input_size: 16}}"]
    if recipe in ("simmim", "simmim_swin"):  # units of the grids of small images
        return ["model.masking_config.unit=1"]
    return []


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    MIMModel(tiny_config(image_size=16)).save_pretrained(folder)
    return folder


def step(model, optimizer, number: int) -> float:
    torch.manual_seed(number)
    loss = model(torch.randn(2, 3, 64, 64), generator=torch.Generator().manual_seed(number)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.target.update(number)
    return loss.item()


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def check_pair(recipe: str, family: str, source: str, teacher, folder) -> None:
    """Two steps, a save, a reload bit for bit, and a third step that goes on equally; or the refusal."""
    words, reason = overrides_of(recipe, teacher), why_not(recipe, family)
    model_section = section(source, recipe, *words)
    if recipe == "data2vec_small":
        model_section["decoder_config"] |= {"embed": True}
    if reason:
        with pytest.raises(ValueError, match=reason):
            start_model(model_section)
        return
    model, _ = start_model(model_section)
    method = recipes.resolve(recipe)["model"]
    assert (model.config.masking, model.config.decoder, model.config.target) == (
        method["masking"],
        method["decoder"],
        method["target"],
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = adam(model.train())
    losses = [step(model, optimizer, number) for number in (1, 2)]
    assert all(torch.tensor(losses).isfinite())
    unmoved = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(before[name], p)]
    assert not unmoved, unmoved
    model.save_pretrained(folder)
    again = MIMForPreTraining.from_pretrained(folder).train()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    resumed = adam(again)
    resumed.load_state_dict(optimizer.state_dict())
    moving = {name: value.clone() for name, value in model.target.moving_state().items()}
    if moving:
        again.target.load_moving_state(moving)
    assert step(again, resumed, 3) == step(model, optimizer, 3)


DIAGONAL = [("quick", "dinov3"), ("simmim", "clip"), ("a2mim_resnet18_small", "convnext"), ("spark_small", "resnet")]
DIAGONAL += [("maskfeat_small", "clip_gelu_new"), ("data2vec_small", "dinov2"), ("simmim_swin", "swin")]


@pytest.mark.parametrize(("recipe", "family"), DIAGONAL)
def test_recipe_and_family(recipe, family, sources, teacher, tmp_path):
    check_pair(recipe, family, sources(family), teacher, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_with_every_family(recipe, family, sources, teacher, tmp_path):
    check_pair(recipe, family, sources(family), teacher, tmp_path)


# ---- back to its own class -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", EACH)
def test_what_was_adapted_goes_back_to_its_own_class(family, sources, tmp_path):
    model, _ = start_model(section(sources(family), "quick"))
    perturb(model, 0.02)  # in place of training
    model.eval().save_pretrained(tmp_path / "ours")
    library = "timm" if family in TIMM else "transformers"
    asked = None if model.config.origin else library
    export(str(tmp_path / "ours"), tmp_path / "theirs", asked)
    if library == "timm":
        theirs = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True).eval()
        assert type(theirs) is type(library_model(family))
    else:
        kind = type(library_model(family))
        assert json.loads((tmp_path / "theirs" / "config.json").read_text())["architectures"] == [kind.__name__]
        theirs = kind.from_pretrained(tmp_path / "theirs").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours = model.mim(images).last_hidden_state
    torch.testing.assert_close(own_features(theirs, images), ours, **TOLERANCE)


# ---- channels ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["vit", "swin", "resnet"])
def test_other_channels(family, sources):
    grey, source = torch.randn(2, 1, 64, 64), sources(family)
    with pytest.raises(ValueError, match=r"takes 3 channels and .* 5: .*repeat .*average .*new .*num_channels=3"):
        start_model(section(source, "quick", "model.num_channels=5"))
    with pytest.raises(ValueError, match="did you mean 'repeat'"):
        start_model(section(source, "quick", "model.num_channels=5", "model.init_channels=repeated"))
    expected = own_features(library_model(family), grey.expand(-1, 3, -1, -1))
    for how, channels in (("repeat", 1), ("average", 1), ("repeat", 6), ("average", 5)):
        words = [f"model.num_channels={channels}", f"model.init_channels={how}"]
        model, _ = start_model(section(source, "quick", *words))
        with torch.no_grad():
            features = model.eval().mim(grey.expand(-1, channels, -1, -1)).last_hidden_state
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)  # equal channels give what they gave
    model, _ = start_model(section(source, "quick", "model.num_channels=5", "model.init_channels=new"))
    assert model(torch.randn(2, 5, 64, 64)).loss.isfinite()


def test_repeat_takes_the_channels_in_turn_and_average_their_mean(sources):
    old = library_model("vit").embeddings.patch_embeddings.projection.weight
    for how, expected in (
        ("repeat", old[:, [0, 1, 2, 0, 1]]),
        ("average", old.mean(1, keepdim=True).expand(-1, 5, -1, -1)),
    ):
        words = ["model.num_channels=5", f"model.init_channels={how}"]
        model, _ = start_model(section(sources("vit"), "quick", *words))
        weight = model.mim.encoder.patch_embedding.weight.unflatten(1, (16, 16, 5)).permute(0, 3, 1, 2)
        torch.testing.assert_close(weight, expected * 3 / 5, rtol=1e-6, atol=1e-7)
