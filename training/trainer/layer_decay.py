"""Layer-wise learning rates: the deeper a layer, the more of the learning rate it gets (ELECTRA, BEiT 2106.08254)."""

from torch import nn

from hf_mim.modeling.encoder_base import Encoder, is_mask_parameter
from hf_mim.training.trainer.optimization import unwrapped_name


def layer_of_parameters(
    model: nn.Module, encoder: Encoder, without: str = "finetune.layer_decay=1"
) -> tuple[dict[str, int], int]:
    """The layer of every parameter of a model by name, and that of its head.

    0 is what comes before the encoder's first block in the order of definition (patch embedding, tokens, positions);
    blocks count from 1 to L; L + 1 is all the rest: last norm, shared position biases, mask token, pooler, head.

    Args:
        without: the setting that does without layers.

    Raises:
        ValueError: the encoder's blocks cannot be told apart.
    """
    blocks = encoder.blocks()
    if not blocks:
        raise ValueError(
            f"the blocks of this encoder cannot be told apart: it has no list of blocks of one kind; set {without}"
        )
    layers = {id(p): i + 1 for i, block in enumerate(blocks) for module in block for p in module.parameters()}
    head, before = len(blocks) + 1, True
    late = {id(p) for module in encoder.modules_after_blocks() for p in module.parameters()}
    late |= {id(p) for name, p in encoder.named_parameters() if is_mask_parameter(name)}
    for parameter in encoder.parameters():
        before = before and layers.get(id(parameter)) is None
        layers.setdefault(id(parameter), 0 if before and id(parameter) not in late else head)
    names = {unwrapped_name(name): layers.get(id(p), head) for name, p in model.named_parameters()}
    return names, head


def parameter_groups(model, layers: dict[str, int], head: int, decay: float, lr: float, weight_decay: dict) -> list:
    """The groups of an optimizer: one for every layer and weight decay that occurs, from the head down, so that the
    rate that the log shows, which is the first group's, is the head's.

    Args:
        layers, head: as of `layer_of_parameters`.
        decay: rates of layer l are lr * decay^(head - l).
        weight_decay: by the name of a parameter.
    """
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = layers[unwrapped_name(name)]
            groups.setdefault((-layer, weight_decay[name]), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * decay ** (head + minus_layer), "weight_decay": weight}
        for (minus_layer, weight), parameters in sorted(groups.items(), key=lambda entry: entry[0])
    ]


def freeze_layers(model: nn.Module, encoder: Encoder, count: int) -> None:
    """Freezes the embedding and the first `count` blocks of the model's encoder; the mask token is trained on.

    Raises:
        ValueError: the blocks cannot be told apart, or none would be left.
    """
    layers, head = layer_of_parameters(model, encoder, "training.freeze_layers=0")
    if count >= head - 1:
        raise ValueError(
            f"training.freeze_layers={count} leaves none of the encoder's {head - 1} blocks to train: choose from 0 to "
            f"{head - 2}"
        )
    encoder.freeze(p for name, p in model.named_parameters() if layers[unwrapped_name(name)] <= count)
