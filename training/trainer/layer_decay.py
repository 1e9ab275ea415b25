"""Layer-wise learning rates: the deeper a layer, the more of the learning rate it gets (ELECTRA, BEiT 2106.08254)."""

from torch import nn

from hf_mim.modeling.encoder_base import Encoder
from hf_mim.training.trainer.optimization import unwrapped_name


def layer_of_parameters(model: nn.Module, encoder: Encoder) -> tuple[dict[str, int], int]:
    """The layer of every parameter of a model by name, and that of its head.

    0 is what comes before the encoder's first block in the order of definition (patch embedding, tokens, positions);
    blocks count from 1 to L; L + 1 is all the rest: last norm, shared position biases, pooler, head.

    Raises:
        ValueError: the encoder's blocks cannot be told apart.
    """
    blocks = encoder.blocks()
    if not blocks:
        raise ValueError(
            "the blocks of this encoder cannot be told apart: it has no list of blocks of one kind; set "
            "finetune.layer_decay=1"
        )
    layers = {id(p): i + 1 for i, block in enumerate(blocks) for module in block for p in module.parameters()}
    head, before = len(blocks) + 1, True
    late = {id(p) for module in encoder.modules_after_blocks() for p in module.parameters()}
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
