"""How the methods draw their first weights. Deviations of the released classes: tests/fixtures/reference/init.json."""

from torch import nn
from transformers import initialization as init


# xavier: MAE. trunc_normal: SimMIM, BEiT-v2 and DTM, N(0, 0.02) cut at one deviation (std 0.0108), what ends a residual
# branch of block l divided by sqrt(2 l). normal: A2MIM and DINO, N(0, 0.02). data2vec: as normal, with a class token of
# std 1 and a xavier patch embedding.
INITIALIZATIONS = ("xavier", "trunc_normal", "normal", "data2vec")
LINEAR = ("xavier", "trunc_normal", "normal", "torch")
STD = 0.02
Layer = nn.Linear | nn.Conv2d | nn.ConvTranspose2d


def draw_as(layer: Layer, kind: str) -> None:
    """Has the model draw the weights of this layer as one of `LINEAR`, or `kaiming`, when it draws all."""
    layer.drawn_as = kind  # type: ignore[assignment]


def draw_linear(layer: Layer, kind: str, scale: float = 1.0) -> None:
    """Draws a layer's weights as one of `LINEAR` says, times `scale`, or `kaiming`, for a ReLU behind it; its bias is
    0, but for torch's default."""
    if kind == "xavier":
        init.xavier_uniform_(layer.weight)
    elif kind == "trunc_normal":
        init.trunc_normal_(layer.weight, std=STD * scale, a=-STD * scale, b=STD * scale)
    elif kind == "normal":
        init.normal_(layer.weight, std=STD * scale)
    elif kind == "kaiming":
        init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    else:
        init.kaiming_uniform_(layer.weight, a=5**0.5)
    if layer.bias is not None:
        if kind == "torch":
            draw_default_bias(layer)
        else:
            init.zeros_(layer.bias)


def draw_default_bias(layer: Layer) -> None:
    """As torch does."""
    assert layer.bias is not None
    bound = layer.weight[0].numel() ** -0.5
    init.uniform_(layer.bias, -bound, bound)
