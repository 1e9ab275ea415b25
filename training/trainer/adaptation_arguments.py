"""How much of an encoder is trained, and how fast: options of pretraining and of fine-tuning."""

from dataclasses import dataclass, field, fields


@dataclass
class AdaptationArguments:
    """Of the sections `training`, for pretraining, and `finetune`.

    Args:
        layer_decay: the learning rate of block l of L is that of the head times layer_decay^(L + 1 - l), the
            embedding's being l = 0 (BEiT, 2106.08254); of a ConvNet's stages likewise. The head of pretraining is its
            decoder, with the mask token.
        lora: train low-rank additions to the linear layers of the encoder's blocks (2106.09685) by PEFT, what comes
            after the encoder in full, and leave the rest as it is. What is saved has the additions multiplied out.
        lora_rank, lora_alpha, lora_dropout: of PEFT's `LoraConfig`.
        lora_layers: last names of the layers that get one, say [qkv]; None takes all.
    """

    layer_decay: float = 1.0
    lora: bool = False
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_layers: list[str] | None = field(default=None)

    def check_adaptation(self, section: str) -> None:
        """Raises:
        ValueError: a value is out of range.
        """
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"{section}.lora_dropout must be in [0, 1), not {self.lora_dropout}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"{section}.layer_decay must be in (0, 1], not {self.layer_decay}")
        for name in ("lora_rank", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"{section}.{name} must be at least 1, not {getattr(self, name)}")


ADAPTATION = tuple(option.name for option in fields(AdaptationArguments))
