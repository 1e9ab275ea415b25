"""LoRA through PEFT: low-rank additions to an encoder's blocks, with what comes after the encoder trained in full."""

import copy
import re
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from hf_mim.modeling.encoder_base import Encoder, is_mask_parameter
from hf_mim.modeling.modeling_mim import MIMForImageClassification, MIMForPreTraining
from hf_mim.modeling.options import unknown_choice
from hf_mim.training.trainer.adaptation_arguments import AdaptationArguments


ADAPTER = "adapter"  # in a run's folder; beside the merged checkpoint transformers would load it in its place
NAME = "default"  # PEFT's, of an adapter
# What to do in its place, by the section of the recipe.
INSTEAD = {
    "finetune": "finetune.freeze=true to train pooler and head only",
    "training": "training.freeze_layers to leave the first blocks as they are",
}


def lora_config(model: nn.Module, encoder: Encoder, options: AdaptationArguments, section: str, **more) -> LoraConfig:
    """Additions (LoRA, 2106.09685) to linear layers of the encoder's blocks.

    Args:
        model: that the encoder is in.
        section: of the recipe that `options` is.
        more: of `LoraConfig`.

    Raises:
        ValueError: the blocks have no linear layers, or none of the names in `options.lora_layers`.
    """
    inside = {id(module) for block in encoder.blocks() for part in block for module in part.modules()}
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside]
    names = sorted({name.rpartition(".")[2] for name in linear})
    if not names:
        raise ValueError(
            f"LoRA adds to linear layers, and the blocks of this encoder ({kind_of(model)}) have none: set "
            f"{section}.lora=false, or {INSTEAD[section]}"
        )
    for name in options.lora_layers or ():
        if name not in names:
            raise unknown_choice(f"layer in {section}.lora_layers", name, names)
    chosen = [name for name in linear if name.rpartition(".")[2] in (options.lora_layers or names)]
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="|".join(re.escape(name) for name in chosen),  # a pattern of whole names
        **more,
    )


def kind_of(model) -> str:
    return (model.config.encoder_config or {}).get("model_type", model.config.encoder)


# ---- fine-tuning ---------------------------------------------------------------------------------------------------
def add_lora(model: MIMForImageClassification, options: AdaptationArguments, source: str) -> PeftModel:
    """Freezes the model but for new additions, pooler and head.

    Args:
        source: what the adapter names as its base.

    Raises:
        ValueError: as of `lora_config`.
    """
    trained = ["classifier", "mim.pooler", "mim.pooled_norm"]
    saved = [name for name in trained if any(True for _ in model.get_submodule(name).parameters())]
    config = lora_config(model, model.mim.encoder, options, "finetune", modules_to_save=saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about a property of transformers that PEFT still asks for
        adapted = get_peft_model(model, config)
    adapted.peft_config[NAME].base_model_name_or_path = source
    return adapted


def save_adapted(model: PeftModel, folder: Path) -> None:
    """Writes the adapter into `folder/adapter`, and the model with the additions multiplied out into `folder`."""
    model.save_pretrained(str(folder / ADAPTER))
    copy.deepcopy(model).merge_and_unload().save_pretrained(folder)


# ---- pretraining: the model keeps its class, and what is saved of it is plain ----------------------------------------
def inject_lora(model: MIMForPreTraining, options: AdaptationArguments) -> None:
    """Freezes the encoder but for new additions and its mask token, in place. Decoder and target are left as they are.

    Raises:
        ValueError: as of `lora_config`.
    """
    encoder = model.mim.encoder
    config = lora_config(model, encoder, options, "training")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():  # PEFT has frozen everything but its own
        in_encoder = name.startswith("mim.encoder.") and not is_mask_parameter(name)
        if name in trained and not in_encoder:
            parameter.requires_grad_(True)


def lora_layers(model: nn.Module) -> dict[str, Linear]:
    """The layers that have an addition, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


@torch.no_grad()
def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model, with its additions multiplied out: W + (alpha / rank) B A, under the names that they have
    without."""
    state, layers = dict(model.state_dict()), lora_layers(model)
    for name, layer in layers.items():
        base = state[f"{name}.base_layer.weight"]
        state[f"{name}.base_layer.weight"] = base + layer.get_delta_weight(NAME).to(base)
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def merge_lora(model: nn.Module) -> None:
    """Multiplies the additions out, in place: the layers are plain ones again."""
    state = plain_state(model)
    for name, layer in lora_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model.load_state_dict(state)
