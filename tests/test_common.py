"""What transformers' own common model tests ask of every model, for each of our classes over each kind of encoder."""

import inspect

import pytest
import torch
from helpers import CONVNEXT, NATIVE_VIT, RESNET, SWIN, tiny_config

from hf_mim import MIMBackbone, MIMForImageClassification, MIMForPreTraining, MIMModel
from hf_mim.modeling.modeling_upernet import MIMUperNet, MIMUperNetConfig


ENCODERS = {
    "vit": {"pooler": "attention", "encoder_config": {"num_register_tokens": 1, "layer_scale_init_value": 0.1}},
    "vit_relative": {"encoder_config": {"mask_style": "token", "position_embedding": ["relative", "learned"]}},
    "resnet": {"image_size": 32, "encoder": "convnet", "encoder_config": RESNET, "decoder": "linear"},
    "convnext": {"image_size": 64, "encoder": "convnet", "encoder_config": CONVNEXT, "decoder": "linear"},
    "timm": {
        "image_size": 32,
        "encoder": "convnet",
        "encoder_config": {"model_type": "timm", "model_name": "resnet10t"},
        "decoder": "linear",
    },
    "native_vit": {"encoder": "native", "encoder_config": NATIVE_VIT, "decoder": "linear"},
    "native_swin": {"encoder": "native", "encoder_config": SWIN, "decoder": "linear"},
}
CLASSES = [MIMModel, MIMForPreTraining, MIMForImageClassification, MIMBackbone, MIMUperNet]
EVERY = pytest.mark.parametrize("name", ENCODERS)
EVERY_MODEL = pytest.mark.parametrize("model_class", CLASSES, ids=lambda model_class: model_class.__name__)


def config_of(name: str, model_class: type = MIMModel):
    config = tiny_config(**ENCODERS[name])
    if model_class is not MIMUperNet:
        return config
    backbone = tiny_config(**ENCODERS[name], out_features=config.stage_names[-2:])
    return MIMUperNetConfig(backbone_config=backbone, hidden_size=8, use_auxiliary_head=False, pool_scales=[1, 2])


def build(name: str, model_class: type):
    torch.manual_seed(0)
    return model_class(config_of(name, model_class))


def images(name: str, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    size = config_of(name).image_size
    return torch.randn(batch, 3, size, size)


def tensors(output) -> list[torch.Tensor]:
    """All tensors of a nested output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def run(model, pixel_values, **options):
    torch.manual_seed(2)  # pretraining draws its masks
    return model(pixel_values, **options)


# --- outputs -----------------------------------------------------------------------------------------------------


@EVERY_MODEL
@EVERY
def test_evaluation_is_deterministic_and_tuples_hold_the_same(name, model_class):
    model, pixel_values = build(name, model_class).eval(), images(name)
    assert next(iter(inspect.signature(model.forward).parameters)) == "pixel_values"
    with torch.no_grad():
        first, again = run(model, pixel_values), run(model, pixel_values)
        as_tuple = run(model, pixel_values, return_dict=False)
        model.config.return_dict = False  # for the models inside, too
        configured = run(model, pixel_values)
    assert isinstance(as_tuple, tuple) and isinstance(configured, tuple)
    for others in (again, as_tuple, configured):
        pairs = list(zip(tensors(first), tensors(others), strict=True))
        assert pairs and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("model_class", [MIMModel, MIMForPreTraining, MIMForImageClassification, MIMBackbone])
@EVERY
def test_hidden_states_by_index(name, model_class):
    model, pixel_values = build(name, model_class).eval(), images(name)
    with torch.no_grad():
        every = run(model, pixel_values, output_hidden_states=True).hidden_states
        chosen = run(model, pixel_values, output_hidden_states=[1, -1, 99]).hidden_states
        assert run(model, pixel_values).hidden_states is None
        assert run(model, pixel_values, output_hidden_states=False).hidden_states is None
        model.config.output_hidden_states = True
        model.base_model.config.output_hidden_states = True
        configured = run(model, pixel_values).hidden_states
    assert len(every) == len(chosen) == len(configured) == len(config_of(name).stage_names)
    kept = {1, len(every) - 1}
    for i, (state, same, other) in enumerate(zip(every, configured, chosen)):
        assert torch.equal(state, same)
        assert torch.equal(state, other) if i in kept else other is None


@EVERY
def test_hidden_states_and_attentions_carry_gradients(name):
    model = build(name, MIMModel)
    has_attentions = model.encoder.has_attentions
    out = model(images(name), output_hidden_states=True, output_attentions=has_attentions)
    captured = [out.hidden_states[0], *([out.attentions[0]] if has_attentions else [])]
    for tensor in captured:
        tensor.retain_grad()
    out.last_hidden_state.square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in captured)
    if model.config.encoder == "convnet":
        with pytest.raises(ValueError, match="no attentions"):
            model(images(name), output_attentions=True)


# --- weights -----------------------------------------------------------------------------------------------------


@EVERY_MODEL
@EVERY
def test_what_a_checkpoint_lacks_is_initialised(name, model_class, tmp_path, monkeypatch):
    """New memory is filled with NaN here: what nobody initialises would keep it."""
    model = build(name, model_class)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    removed = {key for i, key in enumerate(state) if i % 2}
    mismatched = {key for i, key in enumerate(state) if i % 8 == 0 and state[key].ndim > 0}
    kept = {key: value for key, value in state.items() if key not in removed}
    kept |= {
        key: torch.zeros(*value.shape[:-1], value.shape[-1] + 1) for key, value in kept.items() if key in mismatched
    }
    model.save_pretrained(tmp_path, state_dict=kept)
    empty_like = torch.empty_like

    def filled(tensor, **options):
        new = empty_like(tensor, **options)
        return new.fill_(float("nan")) if new.is_floating_point() and not new.is_meta else new

    monkeypatch.setattr(torch, "empty_like", filled)
    loaded = model_class.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    scratch = build(name, model_class)
    for key, value in loaded.state_dict().items():
        if key not in removed | mismatched:
            assert torch.equal(value, state[key]), key
            continue
        fresh = scratch.state_dict()[key].float()
        assert value.isfinite().all(), key
        assert value.dtype == state[key].dtype
        if fresh.numel() < 2 or fresh.std() == 0:
            assert torch.equal(value.float(), fresh), key
        elif fresh.numel() >= 64:
            assert 0.5 < value.std() / fresh.std() < 2, key
    assert all(buffer.isfinite().all() for buffer in loaded.buffers() if buffer.is_floating_point())


def test_missing_timm_weights_are_timm_s(tmp_path):
    """A norm that timm starts at zero: a general rule would start it at one."""
    config = tiny_config(**ENCODERS["timm"])
    model = MIMModel(config)
    zeros = [key for key, value in model.state_dict().items() if key.endswith("bn2.weight") and not value.any()]
    assert zeros
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if k not in zeros})
    loaded = MIMModel.from_pretrained(tmp_path)
    assert all(not loaded.state_dict()[key].any() for key in zeros)


# --- training ----------------------------------------------------------------------------------------------------


def loss_of(model, pixel_values):
    out = run(model, pixel_values)
    return sum(tensor.float().square().mean() for tensor in tensors(out) if tensor.requires_grad)


@EVERY_MODEL
@EVERY
def test_gradient_checkpointing_where_something_is_checkpointed(name, model_class):
    model, pixel_values = build(name, model_class).train(), images(name)
    loss_of(model, pixel_values).backward()
    plain = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    if not model.supports_gradient_checkpointing:
        assert name in ("resnet", "convnext", "timm")
        with pytest.raises(ValueError, match="does not support"):
            model.activation_checkpointing_enable()
        return
    assert "vit" in name or "native" in name or name == "convnext"
    model.zero_grad()
    calls = []
    model.activation_checkpointing_enable()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            inner = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda *a, inner=inner, **o: calls.append(1) or inner(*a, **o)
    loss_of(model, pixel_values).backward()
    assert calls
    for key, parameter in model.named_parameters():
        if key in plain:
            torch.testing.assert_close(parameter.grad, plain[key], rtol=1e-4, atol=1e-5)


# --- the config --------------------------------------------------------------------------------------------------


def test_the_config_of_text_is_the_config():
    """transformers looks for a field named `decoder`, which here is a name."""
    config = tiny_config()
    assert config.get_text_config() is config
    assert config.get_text_config(decoder=True) is config and config.get_text_config(encoder=True) is config
