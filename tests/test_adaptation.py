"""Continued pretraining: what is frozen, added, slowed down and kept, each against a computation of its own; plain
checkpoints, and exact resumes."""

import io
import json
import os
import signal

import pytest
import torch
from helpers import CONVNEXT, DINOV2, NATIVE_VIT, RESNET, SWIN, perturb, random_masks
from rich.console import Console
from safetensors.torch import load_file
from test_pretrain import TINY, equal, weights
from test_trainer import arguments, dataset, model

from hf_mim import MIMForPreTraining
from hf_mim.training.commands.finetune import finetune
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.trainer import start
from hf_mim.training.trainer.lora import inject_lora, lora_layers, merge_lora, plain_state
from hf_mim.training.trainer.saving import LORA_STATE, last_checkpoint
from hf_mim.training.trainer.trainer import MIMTrainer


ENCODERS = [("vit", {"mask_style": "token"}), ("native", NATIVE_VIT), ("native", SWIN), ("native", DINOV2)]
ENCODERS += [("convnet", CONVNEXT)]
# Gradient descent without anything beside it: what a step does is then a line of arithmetic.
PLAIN = {"optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0, "weight_decay": 0.0}
PLAIN |= {"learning_rate": 0.1, "watch_every": 0.0}


def make(folder, network=None, keep=None, keep_weight=None, **options) -> MIMTrainer:
    network = network or model()
    size = network.config.image_size
    return MIMTrainer(
        model=network,
        args=arguments(folder, **options),
        train_dataset=dataset(),
        data_collator=MIMCollator(network.config, network.mask_grid(size, size)),
        keep=keep,
        keep_weight=keep_weight,
    )


def recorded(trainer: MIMTrainer) -> list[dict]:
    """The inputs of every step, as the model gets them."""
    inputs, compute = [], trainer.compute_loss

    def spy(network, batch, *args, **kwargs):
        inputs.append({name: value.clone() for name, value in batch.items()})
        return compute(network, batch, *args, **kwargs)

    trainer.compute_loss = spy
    return inputs


def gradients(network: MIMForPreTraining, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*((n, p) for n, p in network.named_parameters() if p.requires_grad))
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))


# ---- frozen layers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("encoder", "options", "count", "trained", "size"),
    [
        ("vit", {"mask_style": "token", "drop_path_rate": 0.5, "num_hidden_layers": 3}, 2, "layers.2.", 16),
        ("native", {**NATIVE_VIT}, 1, "network.layers.1.", 16),
        ("convnet", RESNET, 2, "network.encoder.stages.2.", 32),
    ],
)
def test_frozen_layers_stay_with_their_norms_and_paths(tmp_path, encoder, options, count, trained, size):
    decoder = {} if encoder != "convnet" else {"decoder": "linear"}
    network = model(encoder=encoder, encoder_config=options, image_size=size, **decoder)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trainer = make(tmp_path, network, freeze_layers=count, max_steps=1, learning_rate=0.1, warmup_steps=0)
    network.train()
    modes = {name: module.training for name, module in network.mim.encoder.named_modules()}
    network(torch.randn(4, 3, size, size)).loss.backward()
    trainer.create_optimizer().step()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    in_encoder = {name.removeprefix("mim.encoder.") for name in changed if name.startswith("mim.encoder.")}
    later = tuple(trained[:-2] + f"{i}." for i in range(count, 10))
    ends = ("final_norm.weight", "final_norm.bias", "mask_token", "mask_scale")
    assert in_encoder and all(name.startswith(later) or name.endswith(ends) for name in in_encoder), in_encoder
    assert any(name.startswith(trained) for name in in_encoder)
    assert any(name.endswith("mask_token") for name in in_encoder)
    assert any(name.startswith("decoder.") for name in changed)
    inside = [mode for name, mode in modes.items() if name.startswith(trained[:-2] + "0.")]
    assert inside and not any(inside)  # dropped paths and batch norms too
    assert all(mode for name, mode in modes.items() if name.startswith(trained))


def test_all_blocks_frozen_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"freeze_layers=2 leaves none of the encoder's 2 blocks.*from 0 to 1"):
        make(tmp_path, model(), freeze_layers=2)
    assert make(tmp_path, model(), freeze_layers=1)


# ---- layer-wise rates ----------------------------------------------------------------------------------------------
def test_a_step_with_layer_decay_is_that_of_each_layers_rate(tmp_path):
    network = model(encoder_config={"mask_style": "token"})
    trainer = make(tmp_path, network, layer_decay=0.5, max_steps=1, **PLAIN)
    inputs, before = recorded(trainer), {name: p.detach().clone() for name, p in network.named_parameters()}
    twin = MIMForPreTraining(network.config)
    twin.load_state_dict(network.state_dict())
    trainer.train()
    slopes = gradients(twin, twin(**inputs[0]).loss)
    shares = {"layers.0.": 0.5**2, "layers.1.": 0.5, "final_norm.": 1.0, "mask_token": 1.0}
    shares |= {"patch_embedding.": 0.5**3, "prefix_tokens": 0.5**3}
    for name, parameter in network.named_parameters():
        inner = name.removeprefix("mim.encoder.")
        rate = 0.1 * (1.0 if inner == name else next(s for start, s in shares.items() if inner.startswith(start)))
        torch.testing.assert_close(parameter, before[name] - rate * slopes[name], rtol=1e-5, atol=1e-7)


# ---- LoRA ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        ("vit", {"mask_style": "token"}),
        ("native", NATIVE_VIT),
        ("native", SWIN),
        ("native", DINOV2),
        ("convnet", CONVNEXT),
    ],
)
def test_additions_alone_are_trained_and_what_is_saved_is_plain(tmp_path, encoder, options):
    size = 32 if encoder == "convnet" or options is SWIN else 16
    decoder = {"decoder": "linear"} if size == 32 else {}
    network = perturb(model(encoder=encoder, encoder_config=options, image_size=size, **decoder))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pixels, masks = torch.randn(2, 3, size, size), random_masks(2, network.mask_grid(size, size)[0] ** 2, 2)
    trainer = make(tmp_path, network, lora=True, lora_rank=2, lora_alpha=6, max_steps=1, learning_rate=0.1)
    with torch.no_grad():
        for layer in lora_layers(network).values():
            layer.lora_B["default"].weight.normal_()
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert all("lora_" in name or not name.startswith("mim.") or "mask_" in name for name in trained)
    assert any(name.startswith("decoder.") for name in trained) and any("mask_token" in name for name in trained)
    state, layers = plain_state(network), lora_layers(network)
    assert state.keys() == before.keys()
    for name, value in state.items():
        layer = layers.get(name.removesuffix(".weight"))
        added = torch.zeros(())
        if layer is not None:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert a.shape[0] == 2
            added = 6 / 2 * torch.einsum("or,ri->oi", b, a)
            assert added.abs().max() > 1e-2
        torch.testing.assert_close(value, before[name] + added, rtol=1e-6, atol=1e-6)
    network.eval()
    logits = network(pixels, masks).logits
    trainer.save_model(str(tmp_path / "saved"))
    loaded = MIMForPreTraining.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(loaded(pixels, masks).logits, logits, rtol=1e-3, atol=1e-4)
    merge_lora(network)
    assert equal(dict(network.state_dict()), dict(loaded.state_dict()))


def test_lora_takes_the_layers_that_are_named_and_refuses_others(tmp_path):
    network = model()
    inject_lora(network, make(tmp_path, lora_layers=["qkv"]).args)
    assert {name.rpartition(".")[2] for name in lora_layers(network)} == {"qkv"} and len(lora_layers(network)) == 2
    with pytest.raises(ValueError, match="training.lora_layers 'qvk'.*did you mean 'qkv'"):
        make(tmp_path, model(), lora=True, lora_layers=["qvk"])
    resnet = model(encoder="convnet", encoder_config=RESNET, image_size=32, decoder="linear")
    with pytest.raises(ValueError, match=r"\(resnet\) have none: set training.lora=false, or training.freeze_layers"):
        make(tmp_path, resnet, lora=True)


# ---- the distance to the start -------------------------------------------------------------------------------------
def test_steps_near_the_weights_of_the_start_are_those_of_l2_sp(tmp_path):
    network = model(encoder_config={"mask_style": "token"})
    twin = MIMForPreTraining(network.config)
    twin.load_state_dict(network.state_dict())
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    options = {**PLAIN, "weight_decay": 0.3, "logging_steps": 1, "max_steps": 3, "num_train_epochs": 3}
    trainer = make(tmp_path, network, "weights", 0.7, **options)
    inputs = recorded(trainer)
    trainer.train()
    decayed = {name for name, p in twin.named_parameters() if p.ndim > 1 and name.startswith("decoder.")}
    kept_losses = []
    for batch in inputs:
        loss = twin(**batch).loss
        kept = torch.zeros(())
        for name, p in twin.named_parameters():
            if name.startswith("mim.encoder.") and not name.endswith("mask_token"):
                kept = kept + 0.7 / 2 * (p - before[name]).pow(2).sum()
        kept_losses.append(kept.item())
        slopes = gradients(twin, loss + kept)
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.sub_(0.1 * (slopes[name] + 0.3 * p * (name in decayed)))
    for name, p in twin.named_parameters():
        torch.testing.assert_close(network.get_parameter(name), p, rtol=1e-4, atol=1e-6)
    logged = [entry["keep_loss"] for entry in trainer.state.log_history if "keep_loss" in entry]
    assert logged == pytest.approx(kept_losses, rel=1e-4) and logged[0] == 0 < logged[1]


@pytest.mark.parametrize("options", [{}, {"mask_style": "token"}])
def test_the_distance_of_features_is_that_of_standardised_tokens(options):
    network = perturb(model(encoder_config=options, masks_per_image=2)).eval()
    distance = start.FeatureDistance(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    perturb(network, 0.1)
    pixels = torch.randn(3, 3, 16, 16)
    masks = torch.stack([random_masks(3, 16, 5), random_masks(3, 16, 5)], dim=1)
    network.train()  # no paths are dropped here
    result = distance(network, pixels, network(pixels, masks).bool_masked_pos)
    twin = MIMForPreTraining(network.config).eval()
    twin.load_state_dict(before)
    errors = []
    for i in range(3):
        for j in range(2):
            now, then = (
                net.mim(pixels[i : i + 1], masks[i, j : j + 1]).last_hidden_state[0] for net in (network, twin)
            )
            for a, b in zip(now.double(), then.double()):
                a, b = ((t - t.mean()) / (t.var(unbiased=False) + 1e-5).sqrt() for t in (a, b))
                errors.append(((a - b) ** 2).mean())
    torch.testing.assert_close(result.double(), torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)
    slopes = gradients(network, result)
    assert slopes["mim.encoder.patch_embedding.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        ("vit", {}),
        ("native", NATIVE_VIT),
        ("native", SWIN),
        ("native", DINOV2),
        ("convnet", CONVNEXT),
        ("convnet", RESNET),
    ],
)
def test_nothing_is_lost_at_the_start(encoder, options):
    size = 32 if encoder == "convnet" or options is SWIN else 16
    decoder = {"decoder": "linear"} if size == 32 else {}
    network = perturb(model(encoder=encoder, encoder_config=options, image_size=size, **decoder)).eval()
    pixels = torch.randn(2, 3, size, size)
    for distance in (start.FeatureDistance(network), start.WeightDistance(network)):
        network.mim.training = True  # batch norms are in eval mode as in the start
        assert distance(network, pixels, network(pixels).bool_masked_pos).item() < 1e-9


def test_what_does_not_go_together_is_refused(tmp_path):
    for words, message in {
        ("model.keep=features",): "model.keep keeps weights, which are still random: set model.init_from",
        ("training.lora=true",): "training.lora keeps weights, which are still random",
        ("training.freeze_layers=1",): "training.freeze_layers keeps weights",
        ("model.keep=feature", "model.init_from=x"): "unknown model.keep 'feature'.*did you mean 'features'",
        ("model.keep=weights", "model.keep_weight=0", "model.init_from=x"): "keep_weight must be more than 0",
        ("training.lora=true", "training.freeze_layers=1"): "set training.freeze_layers=0",
        ("training.layer_decay=1.5",): r"training.layer_decay must be in \(0, 1\]",
        ("training.freeze_layers=-1",): "must be a number of blocks",
    }.items():
        with pytest.raises(ValueError, match=message):
            pretrain("quick", [*words, f"training.output_dir={tmp_path}/run"])
        assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="model.keep=weights has no effect with training.lora=true"):
        make(tmp_path, model(), "weights", lora=True)
    for words, message in {
        "training.lora=true": "training.lora is an option of pretraining: set finetune.lora",
        "training.freeze_layers=1": "finetune.freeze freezes the whole encoder",
        "model.keep=features": "model.keep is an option of pretraining",
    }.items():
        with pytest.raises(ValueError, match=message):
            finetune("somewhere", "finetune_small", [words, f"training.output_dir={tmp_path}/run"])


# ---- whole runs ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    words = [word for word in TINY if word.startswith("model.")]
    pretrain("quick", [*words, "data.max_train_images=16", "data.max_eval_images=0", "training.max_steps=1",
                       "training.watch_every=0", "training.bf16=false", f"training.output_dir={folder}"],
             Console(file=io.StringIO()))  # fmt: skip
    return folder


def run(source, folder, *words) -> str:
    out = io.StringIO()
    data = ["data.max_train_images=32", "data.max_eval_images=0", "training.bf16=false", "training.logging_steps=1"]
    steps = ["training.per_device_train_batch_size=8", "training.num_train_epochs=1", "training.learning_rate=0.01"]
    pretrain(
        "quick",
        [*data, *steps, f"model.init_from={source}", f"training.output_dir={folder}", *words],
        Console(file=out, width=400),
    )
    return out.getvalue()


WAYS = {
    "features": ["model.keep=features", "training.lora=true", "training.lora_dropout=0.2"],
    "weights": ["model.keep=weights", "training.freeze_layers=1", "training.layer_decay=0.5"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_run_without_a_break(source, tmp_path, monkeypatch, way):
    words = [*WAYS[way], "training.save_strategy=steps", "training.save_steps=1", "training.watch_every=2"]
    printed = run(source, tmp_path / "whole", *words)
    assert "keeping: LoRA of rank 8, near the start's features, with weight 1" in printed or way == "weights"
    step = MIMTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MIMTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "broken", *words)
    checkpoint = last_checkpoint(tmp_path / "broken")
    assert checkpoint.name == "checkpoint-3"
    plain = load_file(checkpoint / "model.safetensors").keys()  # loads anywhere
    assert plain == load_file(source / "model.safetensors").keys()
    assert (checkpoint / LORA_STATE).exists() == (way == "features")
    torch.manual_seed(7)  # as another process would
    out = io.StringIO()
    pretrain(str(tmp_path / "broken"), ["training.resume=true"], Console(file=out, width=400))
    assert "resuming from" in out.getvalue() and "have changed" not in out.getvalue()
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() == plain
    histories = [
        json.loads((last_checkpoint(tmp_path / name) / "trainer_state.json").read_text())["log_history"]
        for name in ("whole", "broken")
    ]
    for key in ("loss", "keep_loss", "forgetting_own_cka"):
        series = [[(entry["step"], entry[key]) for entry in history if key in entry] for history in histories]
        assert series[0] == series[1] and len(series[0]) >= 3


def test_another_start_is_said_on_a_resume(source, tmp_path, monkeypatch):
    moved = tmp_path / "source"
    network = MIMForPreTraining.from_pretrained(source)
    network.save_pretrained(moved)
    run(moved, tmp_path / "run", "model.keep=weights", "training.watch_every=0")
    perturb(network).save_pretrained(moved)
    out = io.StringIO()
    pretrain(str(tmp_path / "run"), ["training.resume=true"], Console(file=out, width=400))
    assert "the weights of model.init_from have changed" in out.getvalue()
