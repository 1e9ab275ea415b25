"""The one pass over the images in which an encoder is measured: every image is encoded once, for all measurements."""

import torch
from torch import Tensor

from hf_mim.analysis import MEASUREMENTS
from hf_mim.analysis.exact_attention import watched_attention
from hf_mim.analysis.images import EncoderImages
from hf_mim.analysis.measurement import Layer, Measurement, Seen, Setting
from hf_mim.modeling.encoder_base import Grid
from hf_mim.modeling.modeling_mim import MIMModel


def measure(
    model: MIMModel,
    images: EncoderImages,
    arguments,
    shared: Grid | None,
    advance=lambda images: None,
) -> dict[str, Measurement]:
    """Every measurement of one encoder: one pass over the images, after a plain one over those for prototypes.

    Args:
        arguments: an `AnalyzeArguments`.
        shared: the smallest grid of final tokens of all encoders that are compared.
        advance: is told how many images were encoded.
    """
    names = arguments.measurements or MEASUREMENTS
    needs_prototypes = any(MEASUREMENTS[name].needs_prototypes for name in names)
    setting = Setting(
        images=len(images.measured),
        grid=model.encoder.token_grid(*images.size),
        common_grid=shared,
        classes=images.classes,
        prototypes=class_prototypes(model, images, arguments.batch_size, advance) if needs_prototypes else None,
        examples=arguments.examples,
        seed=arguments.seed,
    )
    measured = {name: MEASUREMENTS[name](model, setting) for name in names}
    active = [measurement for measurement in measured.values() if measurement.absent is None]
    watching, first = [measurement for measurement in active if measurement.watches_attention], 0
    with torch.inference_mode(), watched_attention(model, watching):
        for pixel_values, labels in images.batches(arguments.batch_size):
            observe(model, pixel_values.to(model.device), labels, first, active)
            first += len(pixel_values)
            advance(len(pixel_values))
    return measured


def observe(model: MIMModel, pixel_values: Tensor, labels: Tensor | None, first: int, measurements: list) -> None:
    """Runs the encoder on one batch and shows it to the measurements; `first` is the number of its first image."""
    size, prefix = (pixel_values.shape[2], pixel_values.shape[3]), model.encoder.num_prefix_tokens
    out = model(pixel_values, output_hidden_states=True)
    for i, state in enumerate(out.hidden_states):
        layer = patch_layer(state, model.encoder, size)
        for measurement in measurements:
            measurement.layer(i, layer)
    tokens = out.last_hidden_state
    final = Layer(tokens[:, prefix:], model.encoder.token_grid(*size))
    seen = Seen(first, pixel_values, labels, tokens, final)
    for measurement in measurements:
        measurement.update(seen)


def patch_layer(state: Tensor, encoder, size: tuple[int, int]) -> Layer:
    """A hidden state, tokens (batch, prefix + patches, dim) or a map (batch, dim, rows, cols), as patch tokens."""
    if state.ndim == 4:
        return Layer(state.flatten(2).transpose(1, 2), (state.shape[2], state.shape[3]))
    (rows, cols), prefix = encoder.token_grid(*size), encoder.num_prefix_tokens
    if state.shape[1] == prefix + rows * cols:
        return Layer(state[:, prefix:], (rows, cols))
    # Of a stage before the last, which has more tokens and none without a place.
    return Layer(state, encoder.state_grid(state.shape[1], *size))


@torch.inference_mode()
def class_prototypes(model: MIMModel, images: EncoderImages, batch_size: int, advance) -> Tensor | None:
    """(classes, dim), float32: the mean of the mean patch token over the images set aside; None without labels."""
    if images.others is None:
        return None
    prefix = model.encoder.num_prefix_tokens
    sums = torch.zeros(len(images.classes), model.encoder.hidden_size, dtype=torch.float64)
    counts = torch.zeros(len(images.classes), dtype=torch.float64)
    for pixel_values, labels in images.prototype_batches(batch_size):
        pooled = model(pixel_values.to(model.device)).last_hidden_state[:, prefix:].mean(dim=1)
        sums.index_add_(0, labels, pooled.cpu().double())
        counts += torch.bincount(labels, minlength=len(counts))
        advance(len(pixel_values))
    return (sums / counts.clamp(min=1)[:, None]).float().to(model.device)
