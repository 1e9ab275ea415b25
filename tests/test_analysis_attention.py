"""Attention flow against float64 loops, and that the fused path is back afterwards."""

import math
import weakref

import pytest
import torch
from analysis import TensorImages, full_pass
from helpers import NATIVE_VIT, RESNET, SWIN, VIT, perturb, tiny_config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_mim import MIMModel
from hf_mim.analysis.attention_flow import AttentionFlow
from hf_mim.analysis.exact_attention import NAME, replaced_attention, watched_attention
from hf_mim.analysis.measurement import Setting


PIXELS = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
DINOV2_REG = {**VIT, "model_type": "dinov2_with_registers", "num_register_tokens": 2}
CASES = {
    "vit": {},
    "registers": {"encoder_config": {"num_register_tokens": 2}},
    "no_cls": {"encoder_config": {"use_cls_token": False}},
    "registers_only": {"encoder_config": {"use_cls_token": False, "num_register_tokens": 3}},
    "relative": {"encoder_config": {"position_embedding": ["relative", "rotary"], "layer_scale_init_value": 0.1}},
    "patches_that_are_not_square": {"encoder_config": {"patch_size": [4, 8]}},
    "native_vit": {"encoder": "native", "encoder_config": NATIVE_VIT},
    "native_deit": {"encoder": "native", "encoder_config": {**NATIVE_VIT, "model_type": "deit"}},
    "native_beit": {
        "encoder": "native",
        "encoder_config": {**NATIVE_VIT, "model_type": "beit", "use_relative_position_bias": True},
    },
    "native_dinov2": {"encoder": "native", "encoder_config": DINOV2_REG},
}


def make(name: str) -> MIMModel:
    torch.manual_seed(0)
    return perturb(MIMModel(tiny_config(**CASES[name]), add_pooling_layer=False)).eval()


def flow(model, pixel_values=PIXELS, batch_size=2) -> dict:
    return full_pass(model, TensorImages(pixel_values), batch_size, ["attention_flow"])["attention_flow"]


def reference(weights, prefix: int, has_cls: bool) -> dict[str, float]:
    """The definitions of Beyond [cls], loop by loop, for one head of one image: weights (length, length) float64."""
    found, patches = {}, range(prefix, len(weights))
    mass = [sum(weights[i][j] for j in patches) + 1e-6 for i in range(len(weights))]

    def entropy(i):
        shares = [weights[i][j] / mass[i] for j in patches]
        return -sum(share * math.log(share + 1e-6) for share in shares)

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    found["patch_self"] = mean(weights[i][i] for i in patches)
    found["patch_self_adj"] = mean(weights[i][i] / mass[i] for i in patches)
    found["patch_entropy"] = mean(entropy(i) for i in patches)
    registers = range(int(has_cls), prefix)
    if registers:
        found["patch_register"] = mean(sum(weights[i][j] for j in registers) for i in patches)
    if has_cls:
        found["cls_cls"], found["cls_cls_adj"] = weights[0][0], weights[0][0] / mass[0]
        found["cls_patch"] = mean(weights[0][j] for j in patches)
        found["patch_cls"] = mean(weights[i][0] for i in patches)
        found["cls_entropy"] = entropy(0)
        if registers:
            found["cls_register"] = sum(weights[0][j] for j in registers)
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_statistic_against_loops_in_float64(name):
    model = make(name)
    curves, encoder = flow(model)["curves"], model.encoder
    double = make(name).double()
    if name.startswith("native"):
        double.encoder.native._attn_implementation = "eager"
    with torch.no_grad():
        attentions = double(PIXELS.double(), output_attentions=True).attentions
    for block, weights in enumerate(attentions):
        found = [
            reference(head.tolist(), encoder.num_prefix_tokens, encoder.has_cls_token)
            for image in weights
            for head in image
        ]
        assert set(found[0]) == {key for key in curves if not key.endswith("magnitude")}
        for key in found[0]:
            expected = sum(one[key] for one in found) / len(found)
            assert curves[key]["mean"][block] == pytest.approx(expected, rel=1e-4), key
            images = torch.tensor([one[key] for one in found]).view(len(PIXELS), -1).mean(dim=1)
            half = 1.959964 * images.std().item() / len(PIXELS) ** 0.5
            width = curves[key]["high"][block] - curves[key]["low"][block]
            assert width / 2 == pytest.approx(half, rel=1e-2, abs=1e-6), key
    assert curves["patch_self"]["x"] == list(range(1, len(attentions) + 1))


@pytest.mark.parametrize("name", ["registers", "native_dinov2", "native_vit"])
def test_the_magnitude_is_that_of_the_attention_branch_before_any_layer_scale(name):
    model = make(name)
    curves = flow(model)["curves"]
    double, prefix = make(name).double(), model.encoder.num_prefix_tokens
    layers = double.encoder.layers if name == "registers" else None
    if layers is None:
        network = double.encoder.network
        layers = network.layers if hasattr(network, "layers") else network.encoder.layer
    with torch.no_grad():
        states = double(PIXELS.double(), output_hidden_states=True).hidden_states
        for block, (layer, entering) in enumerate(zip(layers, states)):
            norm = getattr(layer, "norm1", None) or layer.layernorm_before
            added = layer.attention(norm(entering))
            added = added[0] if isinstance(added, tuple) else added
            ratio = added.norm(dim=2) / (entering.norm(dim=2) + 1e-6)
            assert curves["cls_magnitude"]["mean"][block] == pytest.approx(ratio[:, 0].mean().item(), rel=1e-4)
            patches = ratio[:, prefix:].mean().item()
            assert curves["patch_magnitude"]["mean"][block] == pytest.approx(patches, rel=1e-4)


def test_shares_of_cls_add_up_to_one():
    curves = flow(make("registers"))["curves"]
    for own, patch, register in zip(*(curves[f"cls_{name}"]["mean"] for name in ("cls", "patch", "register"))):
        assert own + 16 * patch + register == pytest.approx(1, abs=1e-5)


def test_uniform_attention_has_the_largest_entropy():
    model = make("vit")
    for layer in model.encoder.layers:
        layer.attention.qkv.weight.data[:32] = 0
        layer.attention.qkv.bias.data[:32] = 0
    result = flow(model)
    for name in ("cls_entropy", "patch_entropy"):
        assert result["curves"][name]["mean"] == pytest.approx([math.log(16)] * 2, abs=1e-4)
    assert result["scalars"]["max_entropy"]["value"] == pytest.approx(math.log(16))
    assert result["curves"]["patch_self"]["mean"] == pytest.approx([1 / 17] * 2, abs=1e-6)
    assert result["curves"]["cls_cls_adj"]["mean"] == pytest.approx([1 / 16] * 2, abs=1e-5)


def test_attention_that_is_the_identity():
    measurement = AttentionFlow(make("vit"), Setting(2, (4, 4), (4, 4), []))
    for block in range(2):
        measurement.attention(block, torch.eye(17).expand(2, 3, -1, -1))
    mean = {name: measurement.averages.mean(name, 0) for name in measurement.averages.sums}
    assert mean["patch_self"] == mean["cls_cls"] == 1 and mean["cls_patch"] == mean["patch_cls"] == 0
    assert mean["patch_self_adj"] == pytest.approx(1, abs=2e-6)
    assert mean["patch_entropy"] == pytest.approx(0, abs=1e-5)


def test_maps_of_the_first_images():
    model, pixels = make("registers"), torch.randn(8, 3, 16, 16)
    maps = flow(model, pixels, batch_size=3)["maps"]
    with torch.no_grad():
        attentions = model(pixels[:6], output_attentions=True).attentions
    assert {len(entry["images"]) for entry in maps.values()} == {6}
    for block, weights in enumerate(attentions):
        looks = weights[:, :, 0, 3:]
        looks = looks / looks.sum(dim=2, keepdim=True)
        entropy = -(looks * looks.log()).sum(dim=2)
        for i in range(6):
            mean = torch.tensor(maps["mean"]["images"][i][block])
            torch.testing.assert_close(mean.flatten(), looks[i].mean(dim=0), atol=2e-5, rtol=0)
            sharp = torch.tensor(maps["sharp"]["images"][i][block])
            torch.testing.assert_close(sharp.flatten(), looks[i, entropy[i].argmin()], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 64, "encoder": "convnet", "encoder_config": RESNET}, "no attention"),
        ({"encoder": "native", "encoder_config": SWIN}, "within windows"),
    ],
)
def test_encoders_without_such_attention_say_so(fields, words):
    model = MIMModel(tiny_config(**fields), add_pooling_layer=False).eval()
    measurement = AttentionFlow(model, Setting(2, (2, 2), (2, 2), []))
    assert words in measurement.absent and measurement.absent.endswith(".")


def test_without_cls_the_statistics_of_patches_remain():
    result = flow(make("no_cls"))
    assert set(result["curves"]) == {"patch_self", "patch_self_adj", "patch_entropy", "patch_magnitude"}
    assert "no [cls]" in result["summary"] and result["maps"] == {}


# ---- the exact path ------------------------------------------------------------------------------------------------
class Watcher:
    """Keeps weak references to what it was shown."""

    def __init__(self, fail_at=None):
        self.alive, self.most, self.fail_at = [], 0, fail_at

    def attention(self, block, weights):
        if block == self.fail_at:
            raise RuntimeError("interrupted")
        assert weights.shape[0] == len(PIXELS)
        self.alive = [reference for reference in self.alive if reference() is not None]
        self.most = max(self.most, len(self.alive) + 1)
        self.alive.append(weakref.ref(weights))

    def branch(self, block, entering, added):
        assert entering.shape == added.shape


def state_of(model) -> tuple:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return [c._attn_implementation for c in configs.values()], hooks, NAME in ALL_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("name", ["vit", "native_vit", "native_beit"])
@pytest.mark.parametrize("fails", [False, True])
@torch.inference_mode()
def test_the_fused_path_is_restored(name, fails):
    model, watcher = make(name), Watcher(fail_at=1 if fails else None)
    before, output = state_of(model), model(PIXELS).last_hidden_state
    assert before[0].count("sdpa") >= 1
    try:
        with watched_attention(model, [watcher]):
            assert NAME in state_of(model)[0] and state_of(model)[1] > before[1]
            watched = model(PIXELS).last_hidden_state
    except RuntimeError as error:
        assert fails and str(error) == "interrupted"
    else:
        assert not fails
        torch.testing.assert_close(watched, output, atol=1e-5, rtol=1e-5)
    assert state_of(model) == before
    assert torch.equal(model(PIXELS).last_hidden_state, output)


@torch.inference_mode()
def test_only_one_matrix_is_there_at_a_time():
    torch.manual_seed(0)
    model = MIMModel(tiny_config(encoder_config={"num_hidden_layers": 5}), add_pooling_layer=False).eval()
    watcher = Watcher()
    with watched_attention(model, [watcher]):
        model(PIXELS)
    assert watcher.most <= 2  # the one that is shown, and the one before while the name still holds it


def test_what_is_kept_does_not_grow_with_the_images():
    model, kept = make("vit"), []
    for count in (8, 24):
        measurement = AttentionFlow(model, Setting(count, (4, 4), (4, 4), [], examples=2))
        for _ in range(count // 4):
            measurement.attention(0, torch.full((4, 2, 17, 17), 1 / 17))
            measurement.seen += 4
        kept.append((sum(len(blocks) for blocks in measurement.averages.sums.values()), len(measurement.maps["mean"])))
    assert kept[0] == kept[1] and kept[0][1] == 2


def test_other_models_are_not_touched():
    model, other = make("vit"), make("vit")
    with replaced_attention(model.encoder, None):
        assert other.config._attn_implementation == "sdpa"
