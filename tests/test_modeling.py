"""The models as a whole: determinism, saving and loading, precision, checkpointing, compilation."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
)

from hf_mim import MIMBackbone, MIMConfig, MIMForImageClassification, MIMForPreTraining, MIMModel
from hf_mim.modeling.masking import sample_masks


VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
RESNET["layer_type"] = "basic"
NATIVE = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4}
SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 3, "patch_size": 4}
DECODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}

CONFIGS = {
    "vit_drop": {"image_size": 24, "encoder_config": VIT, "decoder_config": DECODER},
    "vit_cross_attention": {
        "image_size": [24, 40],
        "num_channels": 4,
        "encoder_config": {**VIT, "patch_size": [4, 8], "num_register_tokens": 2, "position_embedding": "rotary"},
        "decoder": "cross_attention",
        "decoder_config": DECODER,
    },
    "vit_conv": {
        "image_size": 24,
        "encoder_config": {**VIT, "use_cls_token": False, "layer_scale_init_value": 0.1},
        "decoder": "conv",
        "decoder_config": {"hidden_size": 16, "groups": 4, "num_hidden_layers": 1},
        "masking": "inverse_block",
    },
    "vit_token": {
        "image_size": 24,
        "encoder_config": {**VIT, "mask_style": "token", "position_embedding": ["learned", "relative"]},
        "decoder": "linear",
        "masking": "block",
    },
    "vit_add": {
        "image_size": 24,
        "encoder_config": {**VIT, "mask_style": "add", "mask_stage": 1, "pixel_fill": "mean", "final_norm": False},
        "masking_config": {"ratio": 0.6, "unit": 2},
        "decoder_config": DECODER,
        "target_config": {"normalize": False, "loss": "l1"},
    },
    "resnet": {
        "image_size": 64,
        "encoder": "convnet",
        "encoder_config": RESNET,
        "decoder": "linear",
        "masking_config": {"ratio": 0.6},
    },
    "timm_resnet": {
        "image_size": 32,
        "num_channels": 1,
        "encoder": "convnet",
        "encoder_config": {"model_type": "timm", "model_name": "resnet18", "output_stride": 8, "mask_style": "token"},
        "decoder": "transformer",
        "decoder_config": DECODER,
        "pooler": "gem",
    },
    "native_vit": {"image_size": 24, "encoder": "native", "encoder_config": NATIVE, "decoder": "linear"},
    "native_swin": {"image_size": 24, "encoder": "native", "encoder_config": SWIN, "decoder": "linear"},
}


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


def pretraining_model(name: str) -> MIMForPreTraining:
    torch.manual_seed(0)
    return MIMForPreTraining(MIMConfig(**CONFIGS[name]))


def images(config: MIMConfig, batch: int = 2) -> torch.Tensor:
    size = config.image_size
    return torch.randn(batch, config.num_channels, *((size, size) if isinstance(size, int) else size))


def test_it_learns_and_uses_every_parameter(name):
    """An unused parameter would stop DistributedDataParallel."""
    model = pretraining_model(name).train()
    pixel_values = images(model.config, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        torch.manual_seed(1)
        loss = model(pixel_values).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_checkpoint_loads_as_every_class_bit_for_bit(name, tmp_path):
    model = pretraining_model(name).eval()
    model.save_pretrained(tmp_path)
    pixel_values = images(model.config)
    again = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert type(again) is MIMForPreTraining and type(again.config) is MIMConfig
    for key, value in model.config.to_dict().items():
        assert key in ("_name_or_path", "dtype") or getattr(again.config, key) == value, key
    torch.manual_seed(1)
    first = model(pixel_values)
    torch.manual_seed(1)
    second = again(pixel_values)
    assert torch.equal(first.loss, second.loss) and torch.equal(first.logits, second.logits)
    assert type(AutoModelForMaskedImageModeling.from_pretrained(tmp_path)) is MIMForPreTraining
    encoder = AutoModel.from_pretrained(tmp_path)
    wanted = model.mim(pixel_values).last_hidden_state
    assert torch.equal(encoder(pixel_values).last_hidden_state, wanted)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7)
    assert classifier(pixel_values, labels=torch.tensor([1, 2])).logits.shape == (2, 7)
    assert torch.equal(classifier.mim(pixel_values).last_hidden_state, wanted)
    backbone = MIMBackbone.from_pretrained(tmp_path)
    last = backbone(pixel_values).feature_maps[-1].flatten(2).transpose(1, 2)
    assert last.shape[0] == 2 and last.isfinite().all()


def test_a_fine_tuned_checkpoint_loads_as_the_bare_model(tmp_path):
    config = MIMConfig(**CONFIGS["vit_drop"], pooler="gem", num_labels=5)
    classifier = MIMForImageClassification(config).eval()
    with torch.no_grad():
        classifier.mim.pooler.p.fill_(2.0)
    classifier.save_pretrained(tmp_path)
    pixel_values = images(config)
    assert torch.equal(
        AutoModelForImageClassification.from_pretrained(tmp_path)(pixel_values).logits, classifier(pixel_values).logits
    )
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path)(pixel_values).pooler_output, classifier.mim(pixel_values).pooler_output
    )


def test_loading_reports_new_parts_once_and_nothing_else(tmp_path):
    model = MIMForPreTraining(MIMConfig(**{**CONFIGS["vit_token"], "pooler": "gem"}))
    model.save_pretrained(tmp_path)

    def warnings_of(load) -> tuple[str, object]:
        """What transformers says while it loads. (Not through caplog: it hears twice where the logger propagates.)"""
        logger, said = logging.getLogger("transformers"), []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(record.getMessage())
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        try:
            loaded = load()
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
        return "\n".join(said), loaded

    assert warnings_of(lambda: AutoModelForPreTraining.from_pretrained(tmp_path))[0] == ""
    text, encoder = warnings_of(lambda: AutoModel.from_pretrained(tmp_path))
    assert text.count("pooler.p") == 1 and encoder.pooler.p.item() == 3.0
    for word in ("decoder", "mask_token", "UNEXPECTED"):
        assert word not in text
    text, _ = warnings_of(lambda: AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3))
    assert text.count("classifier.weight") == 1 and "decoder" not in text


def test_missing_parts_are_initialised_as_from_scratch(tmp_path):
    """Not left as whatever stood in memory: learned tables, tokens, scales and norms of a checkpoint without them."""
    plain = {**VIT, "mask_style": "drop", "use_cls_token": False}
    MIMForPreTraining(MIMConfig(image_size=24, encoder_config=plain, decoder_config=DECODER)).save_pretrained(tmp_path)
    rich = {**VIT, "mask_style": "token", "position_embedding": ["learned", "relative"]}
    rich |= {"layer_scale_init_value": 0.3, "qk_norm": True, "num_register_tokens": 3}
    config = MIMConfig(image_size=24, encoder_config=rich, decoder="linear")
    model = MIMForPreTraining.from_pretrained(tmp_path, config=config)
    encoder = model.mim.encoder
    assert (encoder.layers[0].scale1.scale == 0.3).all() and (encoder.layers[1].attention.q_norm.weight == 1).all()
    assert (encoder.relative[0].table == 0).all()
    for parameter in (encoder.learned_positions.table, encoder.prefix_tokens, encoder.mask_token):
        assert 0.01 < parameter.std().item() < 0.03 and parameter.abs().max() <= 2


def test_evaluation_is_deterministic_and_independent_of_the_batch(name):
    model = MIMModel(MIMConfig(**CONFIGS[name])).eval()
    pixel_values = images(model.config, 5)
    with torch.no_grad():
        together = model(pixel_values)
        assert torch.equal(model(pixel_values).last_hidden_state, together.last_hidden_state)
        for i in range(5):
            alone = model(pixel_values[i : i + 1])
            torch.testing.assert_close(alone.last_hidden_state[0], together.last_hidden_state[i], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(alone.pooler_output[0], together.pooler_output[i], rtol=1e-4, atol=1e-5)


def test_bfloat16_weights(name):
    model = pretraining_model(name)
    torch.manual_seed(1)
    pixel_values = images(model.config)
    masks = model(pixel_values).bool_masked_pos
    exact = model(pixel_values, masks).loss.item()
    half = copy.deepcopy(model).to(torch.bfloat16)
    out = half(pixel_values, masks)
    assert out.loss.item() == pytest.approx(exact, rel=0.05)
    out.loss.backward()
    assert half.mim(pixel_values).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["vit_drop", "vit_token", "vit_cross_attention"])
def test_gradient_checkpointing_changes_no_gradient(name):
    model = pretraining_model(name).train()
    masks = model(images(model.config)).bool_masked_pos
    pixel_values = images(model.config)

    def gradients():
        model.zero_grad()
        model(pixel_values, masks).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for checkpointed, wanted in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(checkpointed, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_drop", "vit_token", "resnet"])
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    model = pretraining_model(name).eval()
    pixel_values = images(model.config)
    masks = sample_masks(
        model.config, model.mask_grid(*pixel_values.shape[2:]), [np.random.default_rng(i) for i in range(2)]
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if name == "resnet" else "inductor")
    torch.testing.assert_close(
        compiled(pixel_values, masks).loss, model(pixel_values, masks).loss, rtol=1e-4, atol=1e-5
    )


def test_device_map_and_dtype(tmp_path):
    model = pretraining_model("vit_drop").eval()
    model.save_pretrained(tmp_path)
    pixel_values = images(model.config)
    mapped = AutoModel.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(mapped(pixel_values).last_hidden_state, model.mim(pixel_values).last_hidden_state)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(pixel_values).pooler_output.isfinite().all()


def test_no_weight_decay_for_biases_norms_tokens_and_positions():
    model = pretraining_model("vit_token")
    spared = model.parameters_without_decay()
    decayed = {name for name, _ in model.named_parameters()} - spared
    assert {"mim.encoder.mask_token", "mim.encoder.prefix_tokens", "mim.encoder.learned_positions.table"} <= spared
    assert {"mim.encoder.relative.0.table", "mim.encoder.layers.0.norm1.weight"} <= spared
    assert all(name.endswith(".weight") for name in decayed) and len(decayed) == 1 + 2 * 4 + 1


def test_the_config_is_saved_whole(tmp_path):
    config = MIMConfig(**CONFIGS["vit_cross_attention"])
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"]["AutoModel"] == "modeling_mim.MIMModel" and len(saved["auto_map"]) == 6
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.encoder_config == config.encoder_config and again.image_size == [24, 40]
    backbone = AutoBackbone.from_config(again)
    assert type(backbone) is MIMBackbone and backbone.channels == [32]
