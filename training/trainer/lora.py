"""LoRA through PEFT: low-rank additions to an encoder's blocks, with pooler and head trained in full."""

import copy
import re
import warnings
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_mim.modeling.modeling_mim import MIMForImageClassification
from hf_mim.modeling.options import unknown_choice
from hf_mim.training.trainer.finetune_arguments import FinetuneArguments


ADAPTER = "adapter"  # in a run's folder; beside the merged checkpoint transformers would load it in its place


def add_lora(model: MIMForImageClassification, options: FinetuneArguments, source: str) -> PeftModel:
    """Freezes the model but for new additions (LoRA, 2106.09685), pooler and head.

    Args:
        source: what the adapter names as its base.

    Raises:
        ValueError: the blocks have no linear layers, or none of the names in `options.lora_layers`.
    """
    encoder = model.mim.encoder
    inside = {id(module) for block in encoder.blocks() for part in block for module in part.modules()}
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside]
    names = sorted({name.rpartition(".")[2] for name in linear})
    if not names:
        kind = (model.config.encoder_config or {}).get("model_type", model.config.encoder)
        raise ValueError(
            f"LoRA adds to linear layers, and the blocks of this encoder ({kind}) have none: set finetune.lora=false, "
            "or finetune.freeze=true to train pooler and head only"
        )
    for name in options.lora_layers or ():
        if name not in names:
            raise unknown_choice("layer in finetune.lora_layers", name, names)
    chosen = [name for name in linear if name.rpartition(".")[2] in (options.lora_layers or names)]
    trained = ["classifier", "mim.pooler", "mim.pooled_norm"]
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="|".join(re.escape(name) for name in chosen),  # a pattern of whole names
        modules_to_save=[name for name in trained if any(True for _ in model.get_submodule(name).parameters())],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about a property of transformers that PEFT still asks for
        adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = source
    return adapted


def save_adapted(model: PeftModel, folder: Path) -> None:
    """Writes the adapter into `folder/adapter`, and the model with the additions multiplied out into `folder`."""
    model.save_pretrained(str(folder / ADAPTER))
    copy.deepcopy(model).merge_and_unload().save_pretrained(folder)
