"""What fine-tuning is made of, each against an independent computation: rates, averages, mixing, loss, metrics."""

import io

import datasets
import numpy as np
import pytest
import sklearn.utils.class_weight
import torch
from helpers import CONVNEXT, DINOV2, NATIVE_VIT, RESNET, SWIN, tiny_config
from torch import nn
from transformers import TrainerCallback

from hf_mim import MIMForImageClassification
from hf_mim.training.commands.classification import ClassificationLoss
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.augment import ClassificationCollator, LabelledImages
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.labels import balanced_weights
from hf_mim.training.trainer.arguments import MIMTrainingArguments
from hf_mim.training.trainer.finetune_arguments import FinetuneArguments
from hf_mim.training.trainer.finetune_trainer import FinetuneTrainer
from hf_mim.training.trainer.layer_decay import layer_of_parameters


CLASSES = 3


def labelled(count=12, channels=3, seed=0, side=16) -> LabelledImages:
    pixels = np.random.default_rng(0).integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    table = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": array_file(image), "path": None} for image in pixels],
            "label": np.arange(count) % CLASSES,
        },
        features=datasets.Features(
            {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a", "b", "c"])}
        ),
    )
    config = tiny_config(num_channels=channels)
    return LabelledImages(MIMDataset(table, config, DataArguments(crop_scale=[0.5, 1.0]), seed=seed))


def array_file(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, image.transpose(1, 2, 0))
    return buffer.getvalue()


def classifier(seed=0, **changes) -> MIMForImageClassification:
    torch.manual_seed(seed)
    return MIMForImageClassification(tiny_config(num_labels=CLASSES, **changes))


def make(folder, model, data=None, options=None, loss=None, **settings) -> FinetuneTrainer:
    settings = {"per_device_train_batch_size": 4, "save_strategy": "no", "bf16": False, "max_steps": 3} | settings
    options = FinetuneArguments(**(options or {}))
    return FinetuneTrainer(
        model=model,
        args=MIMTrainingArguments(output_dir=str(folder), logging_steps=1, **settings),
        train_dataset=data or labelled(),
        data_collator=ClassificationCollator(model.config, options, CLASSES),
        compute_loss_func=loss or ClassificationLoss(None, 0.0),
        options=options,
        encoder=model.mim.encoder,
    )


# ---- layer-wise rates ----------------------------------------------------------------------------------------------
def rates(trainer) -> dict[str, float]:
    trainer.create_optimizer()
    by_id = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_rates_of_a_vit_are_those_of_the_formula(tmp_path):
    model = classifier(encoder_config={"position_embedding": ["learned", "relative"]})
    trainer = make(tmp_path, model, options={"layer_decay": 0.5}, learning_rate=1.0)
    found = rates(trainer)
    # Two blocks: lr 0.5^(3 - l), embedding l = 0, blocks 1 and 2, the rest 3.
    expected = {
        "mim.encoder.prefix_tokens": 0.125,
        "mim.encoder.patch_embedding.weight": 0.125,
        "mim.encoder.learned_positions.table": 0.125,
        "mim.encoder.layers.0.attention.qkv.weight": 0.25,
        "mim.encoder.relative.0.table": 0.25,
        "mim.encoder.layers.1.mlp.fc2.bias": 0.5,
        "mim.encoder.relative.1.prefix": 0.5,
        "mim.encoder.final_norm.weight": 1.0,
        "classifier.weight": 1.0,
    }
    assert {name: found[name] for name in expected} == expected
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert trainer.optimizer.param_groups[0]["lr"] == 1.0  # what the log shows
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    named = {name: decays[id(p)] for name, p in model.named_parameters()}
    assert named["classifier.weight"] == 0.05 and named["mim.encoder.layers.0.norm1.weight"] == 0
    assert named["mim.encoder.prefix_tokens"] == 0 and named["mim.encoder.learned_positions.table"] == 0


@pytest.mark.parametrize(
    ("encoder", "options", "layers", "examples"),
    [
        (
            "convnet",
            RESNET,
            4,
            {"network.embedder.": 0, "network.encoder.stages.0.": 1, "network.encoder.stages.3.": 4},
        ),
        ("convnet", CONVNEXT, 4, {"network.embeddings.": 0, "network.encoder.stages.2.": 3}),
        (
            "convnet",
            {"model_type": "timm", "model_name": "resnet18"},
            4,
            {"network.parts.0.": 0, "network.parts.4.": 4},
        ),
        ("native", NATIVE_VIT, 2, {"network.embeddings.": 0, "final_norm.": 3}),
        ("native", DINOV2, 2, {"network.embeddings.": 0, "final_norm.": 3}),
        ("native", SWIN, 2, {"network.embeddings.": 0, "final_norm.": 3}),
        ("native", {**SWIN, "depths": [2, 1]}, 3, {"network.embeddings.": 0}),
    ],
)
def test_layers_of_other_encoders(encoder, options, layers, examples):
    with torch.device("meta"):
        model = MIMForImageClassification(tiny_config(encoder=encoder, encoder_config=options, image_size=32))
    found, head = layer_of_parameters(model, model.mim.encoder)
    assert head == layers + 1 and set(found.values()) == set(range(layers + 2))
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert found["classifier.weight"] == head
    for start, layer in examples.items():
        names = [name for name in found if name.startswith(f"mim.encoder.{start}")]
        assert names and {found[name] for name in names} == {layer}
    order = [found[name] for name, _ in model.mim.encoder.network.named_parameters(prefix="mim.encoder.network")]
    assert order == sorted(order)  # blocks follow each other as they are defined


def test_the_merging_of_swins_patches_belongs_to_the_block_before_it():
    with torch.device("meta"):
        model = MIMForImageClassification(
            tiny_config(encoder="native", encoder_config={**SWIN, "depths": [2, 1]}, image_size=32)
        )
    found, _ = layer_of_parameters(model, model.mim.encoder)
    merging = {layer for name, layer in found.items() if ".downsample." in name}
    assert merging == {2}


def test_without_layer_decay_every_rate_is_the_same(tmp_path):
    assert set(rates(make(tmp_path, classifier(), learning_rate=0.3)).values()) == {0.3}


def test_an_encoder_without_blocks_says_so(tmp_path):
    model = classifier(encoder="native", encoder_config=NATIVE_VIT)
    model.mim.encoder.network = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"blocks of this encoder cannot be told apart.*finetune.layer_decay=1"):
        make(tmp_path, model, options={"layer_decay": 0.5})


# ---- the moving average --------------------------------------------------------------------------------------------
def test_the_average_is_the_recurrence(tmp_path):
    model = classifier()
    trainer = make(tmp_path, model, options={"ema": 0.7}, max_steps=4, learning_rate=1e-2)
    names = ["mim.encoder.layers.0.attention.qkv.weight", "classifier.bias"]
    parameters = dict(model.named_parameters())
    expected = {name: parameters[name].detach().double().clone() for name in names}
    seen = []

    class Recurrence(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for name in names:
                expected[name] = 0.7 * expected[name] + 0.3 * parameters[name].detach().double()
            seen.append(state.global_step)

    trainer.add_callback(Recurrence())
    trainer.train()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    average = dict(trainer.average.module.named_parameters())
    for name in names:
        torch.testing.assert_close(average[name].double(), expected[name], rtol=1e-5, atol=1e-7)
        assert (average[name] - parameters[name]).abs().max() > 1e-4
    assert len(seen) == 4
    with trainer.averaged():
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.average.module.parameters()))
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())


def test_what_is_evaluated_is_the_average(tmp_path):
    model, data = classifier(), labelled()
    trainer = make(tmp_path, model, data, options={"ema": 0.9}, learning_rate=1e-2)
    trainer.train()
    whole = LabelledImages(data.dataset.without_augmentation())
    found = trainer.predict(whole)
    pixels = trainer.data_collator([whole.__getitems__(list(range(12)))[0]])["pixel_values"]
    with torch.no_grad():
        average, own = trainer.average.module.eval()(pixels).logits, model.eval()(pixels).logits
    np.testing.assert_allclose(found.predictions, average.numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(found.predictions - own.numpy()).max() > 1e-3


# ---- checkpoints ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("encoder", [SWIN, NATIVE_VIT, DINOV2])
def test_a_checkpoint_gives_back_every_weight(tmp_path, encoder):
    """transformers saves Swin's weights under other names than the model has."""
    model = classifier(encoder="native", encoder_config=encoder)
    trainer = make(tmp_path, model, save_strategy="steps", save_steps=2, max_steps=2, learning_rate=1e-2)
    trainer.train()
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    for load in (lambda: trainer._load_from_checkpoint(str(tmp_path / "checkpoint-2")), trainer._load_best_model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        load()
        assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")  # of the best checkpoint, while the run went on
    said: list[str] = []
    trainer.warn = said.append
    trainer._load_best_model()
    assert said[0].startswith(
        f"warning: {file.parent}, the best checkpoint, cannot be used: model.safetensors is damaged"
    )
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


# ---- mixing and the loss -------------------------------------------------------------------------------------------
def collate(batches: list[list[int]], options: dict, data=None, epoch=0):
    data = data or labelled()
    data.set_epoch(epoch)
    collator = ClassificationCollator(
        tiny_config(num_channels=data.dataset.num_channels), FinetuneArguments(**options), 3
    )
    made = [collator(data.__getitems__(batch)) for batch in batches]
    return torch.cat([m["pixel_values"] for m in made]), torch.cat([m["labels"] for m in made])


ALL = {"mixup": 0.8, "cutmix": 1.0, "randaugment": 9, "random_erasing": 0.5}


def test_augmentation_follows_from_seed_epoch_and_index_alone():
    order = [5, 2, 9, 0, 7, 1, 3, 8]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = collate([order], ALL)
    assert torch.equal(state, torch.get_rng_state())  # torch's own randomness is left alone
    torch.manual_seed(2)
    for split in ([order[:4], order[4:]], [order[:2], order[2:8]]):
        again = collate(split, ALL)
        assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])
    other = collate([order], ALL, epoch=1)
    assert not torch.equal(whole[0], other[0]) and not torch.equal(whole[1], other[1])
    seeded = collate([order], ALL, data=labelled(seed=1))
    assert not torch.equal(whole[0], seeded[0])


def test_evaluation_augments_nothing():
    data = LabelledImages(labelled().dataset.without_augmentation())
    pixels, labels = collate([[3, 4, 5]], ALL, data=data)
    images = data.dataset.images[3:6].float() / 255
    config = tiny_config()
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
    torch.testing.assert_close(pixels, (images - mean) / std, rtol=1e-5, atol=1e-5)
    assert labels.tolist() == [0, 1, 2]


def test_mixup_is_a_share_of_two_neighbours():
    order = [0, 1, 2, 4, 5]  # labels 0 1 2 1 2
    plain, labels = collate([order], {})
    mixed, shares = collate([order], {"mixup": 1.0})
    assert torch.equal(mixed[4], plain[4]) and shares[4].tolist() == [0, 0, 1]  # the odd one out
    for i, j in ((0, 1), (2, 3)):
        share = shares[i, labels[i]].item()
        assert 0 < share < 1
        torch.testing.assert_close(mixed[i], share * plain[i] + (1 - share) * plain[j], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed[j], share * plain[j] + (1 - share) * plain[i], rtol=1e-4, atol=1e-5)
        assert shares[i, labels[j]].item() == pytest.approx(1 - share, abs=1e-6)
        assert shares[j, labels[j]].item() == pytest.approx(share, abs=1e-6)
    assert shares[0, labels[0]] != shares[2, labels[2]]


def test_cutmix_labels_are_the_shares_of_pixels():
    order = [0, 1, 2, 4, 5, 7]
    plain, labels = collate([order], {})
    mixed, shares = collate([order], {"cutmix": 1.0})
    for i, j in ((0, 1), (2, 3), (4, 5)):
        own, other = (mixed[i] == plain[i]).all(0), (mixed[i] == plain[j]).all(0)
        assert (own | other).all()
        assert shares[i, labels[i]].item() == pytest.approx(own.float().mean().item(), abs=1e-5)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)


def test_mix_probability_leaves_pairs_alone():
    plain, labels = collate([list(range(12))], {})
    pixels, shares = collate([list(range(12))], {"mixup": 1.0, "mix_probability": 0.5})
    same = [torch.equal(a, b) for a, b in zip(pixels, plain)]
    assert 0 < sum(same) < 12 and same[::2] == same[1::2]


def test_random_erasing_puts_noise_into_a_rectangle():
    plain, _ = collate([list(range(12))], {})
    erased, _ = collate([list(range(12))], {"random_erasing": 1.0})
    for before, after in zip(plain, erased):
        changed = (before != after).any(0)
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert 0 < changed.sum() == box <= 256 / 3 + 16


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_randaugment_takes_any_number_of_channels(channels):
    data = labelled(channels=channels)
    plain, _ = collate([list(range(12))], {}, data=data)
    strong, _ = collate([list(range(12))], {"randaugment": 9}, data=data)
    changed = [not torch.equal(a, b) for a, b in zip(plain, strong)]
    assert strong.shape == plain.shape and sum(changed) > 6 and strong.isfinite().all()


@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_is_a_weighted_sum_over_soft_targets(soft):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.randint(0, 4, (6,))
    targets = torch.rand(6, 4).softmax(1) if soft else nn.functional.one_hot(labels, 4).float()
    weights, smoothing, total = torch.tensor([0.5, 1.0, 2.0, 0.0]), 0.1, 0.0
    log_p = logits.double().log_softmax(1)
    for i in range(6):
        for c in range(4):
            target = (1 - smoothing) * targets[i, c].item() + smoothing / 4
            total -= weights[c].item() * target * log_p[i, c].item()
    loss = ClassificationLoss(weights, smoothing)
    given = targets if soft else labels
    # Half of the images of a step: their sum over all of its images.
    found = loss({"logits": logits}, given, torch.tensor(2 * given.numel()))
    assert found.item() == pytest.approx(total / 12, rel=1e-5)
    plain = loss({"logits": logits}, labels)  # evaluation
    assert plain.item() == pytest.approx(-log_p[range(6), labels].mean().item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {**ALL, "label_smoothing": 0.1}])
def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path, options):
    """Also where the last batch is short: every image counts the same."""
    found = []
    for batch, steps in ((10, 1), (4, 3), (2, 5)):
        model, gradients = classifier(), []
        trainer = make(
            tmp_path, model, labelled(10), options, ClassificationLoss(torch.tensor([0.5, 1.0, 2.0]), 0.1), max_steps=1,
            per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_grad_norm=0.0, learning_rate=0.0,
        )  # fmt: skip
        trainer.create_optimizer()
        hook = lambda *_, m=model, g=gradients: g.append(torch.cat([p.grad.flatten() for p in m.parameters()]))  # noqa: E731
        trainer.optimizer.register_step_pre_hook(hook)
        trainer.train()
        found.append(gradients[0])
    assert found[0].abs().max() > 1e-3
    for other in found[1:]:  # float32: sums in another order
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_balanced_weights_are_scikit_learns():
    labels = torch.tensor([0] * 7 + [1] * 2 + [2] * 3)
    expected = sklearn.utils.class_weight.compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    np.testing.assert_allclose(balanced_weights(labels, 3), expected, rtol=1e-6)
    weights = balanced_weights(labels, 4)
    assert weights[3] == 1 and weights[labels].mean().item() == pytest.approx(1, rel=1e-6)
