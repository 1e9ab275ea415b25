"""Layer-wise learning rates: the deeper a layer, the more of the learning rate it gets (ELECTRA, BEiT 2106.08254)."""

from torch import nn

from hf_mim.modeling.encoder_base import Encoder
from hf_mim.modeling.encoder_convnet import ConvNetEncoder, split_network
from hf_mim.modeling.encoder_vit import ViTEncoder
from hf_mim.training.trainer.trainer import WRAPPERS


def encoder_blocks(encoder: Encoder) -> list[list[nn.Module]]:
    """The modules of every block of a transformer or stage of a ConvNet, from the first to the last.

    Raises:
        ValueError: a wrapped model of transformers has nothing that looks like blocks.
    """
    if isinstance(encoder, ViTEncoder):
        return [[layer, *encoder.relative[i : i + 1]] for i, layer in enumerate(encoder.layers)]
    if isinstance(encoder, ConvNetEncoder):
        return [[stage] for stage in split_network(encoder.network)[1]]
    blocks = native_blocks(encoder.network)
    if not blocks:
        raise ValueError(
            f"the layers of the transformers model {encoder.native.model_type!r} cannot be told apart: it has no list "
            "of blocks of one kind; set finetune.layer_decay=1"
        )
    return blocks


def native_blocks(network: nn.Module) -> list[list[nn.Module]]:
    """Of a model of transformers: the outermost list of modules of one class; blocks of stages, where stages are made
    of a list `blocks` (Swin), whose other parts, such as the merging of patches, count as their last block."""
    queue = [network]
    while queue:
        module = queue.pop(0)
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(inner) for inner in module}) == 1:
            break
        queue += list(module.children())
    else:
        return []
    blocks = []
    for stage in module:
        inner = getattr(stage, "blocks", None)
        if not isinstance(inner, nn.ModuleList) or len(inner) == 0:
            blocks.append([stage])
            continue
        blocks += [[block] for block in inner]
        blocks[-1] += [part for name, part in stage.named_children() if name != "blocks"]
    return blocks


def layer_of_parameters(model: nn.Module, encoder: Encoder) -> tuple[dict[str, int], int]:
    """The layer of every parameter of a model by name, and that of its head.

    0 is what comes before the encoder's first block in the order of definition (patch embedding, tokens, positions);
    blocks count from 1 to L; L + 1 is all the rest: last norm, shared position biases, pooler, head.
    """
    blocks = encoder_blocks(encoder)
    layers = {id(p): i + 1 for i, block in enumerate(blocks) for module in block for p in module.parameters()}
    head, before = len(blocks) + 1, True
    shared = getattr(encoder, "shared_relative", None)
    late = {id(p) for p in shared.parameters()} if shared is not None else set()
    for parameter in encoder.parameters():
        before = before and layers.get(id(parameter)) is None
        first = isinstance(encoder, ViTEncoder) or before
        outside = id(parameter) in late or any(parameter is p for p in encoder.final_norm.parameters())
        layers.setdefault(id(parameter), 0 if first and not outside else head)
    names = {WRAPPERS.sub("", name): layers.get(id(p), head) for name, p in model.named_parameters()}
    return names, head


def parameter_groups(model, layers: dict[str, int], head: int, decay: float, lr: float, weight_decay: dict) -> list:
    """The groups of an optimizer: one for every layer and weight decay that occurs, from the head down, so that the
    rate that the log shows, which is the first group's, is the head's.

    Args:
        layers, head: as of `layer_of_parameters`.
        decay: rates of layer l are lr * decay^(head - l).
        weight_decay: by the name of a parameter.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = layers[WRAPPERS.sub("", name)]
            groups.setdefault((-layer, weight_decay[name]), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * decay ** (head + minus_layer), "weight_decay": weight}
        for (minus_layer, weight), parameters in sorted(groups.items(), key=lambda entry: entry[0])
    ]
