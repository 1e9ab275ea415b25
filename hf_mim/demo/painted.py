"""A pretraining model whose mask is an input of any count, as one graph of fixed shapes: for ONNX."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_mim.modeling.decoders import TransformerDecoder
from hf_mim.modeling.encoder_vit import ViTEncoder
from hf_mim.modeling.modeling_mim import MIMForPreTraining
from hf_mim.modeling.options import pair
from hf_mim.training.common.choices import ONNX, check_packages
from hf_mim.training.common.errors import CheckpointError


FAR = -1e4  # what is added to the attention to a hidden token: its weight is 0 in every precision


class PaintedModel(nn.Module):
    """What a model makes of one image under any mask.

    A model that drops hidden tokens computes with as many as are visible: no graph of fixed shapes can do that. Here
    all tokens are encoded, and none attends to a hidden one: the visible ones become exactly what they would be. The
    decoder then gets its mask token in the hidden places.

    Args:
        model: with mask_style token or add; or drop, a ViT and the decoder `transformer`.

    Raises:
        CheckpointError: of another kind.
    """

    def __init__(self, model: MIMForPreTraining):
        super().__init__()
        self.model, encoder = model.eval(), model.mim.encoder
        self.size = pair(model.config.image_size)
        self.grid = model.mask_grid(*self.size)
        self.drops = encoder.drops_tokens
        known = type(encoder) is ViTEncoder and type(model.decoder) is TransformerDecoder
        if self.drops and not known:
            raise CheckpointError("a page needs a model that keeps hidden tokens, or a ViT with decoder transformer")
        if getattr(encoder, "mask_style", "") == "sparse":
            raise CheckpointError("a page cannot show a model with sparse convolutions: its graph depends on the mask")
        model.set_attn_implementation("eager")  # plain operators, which every runtime has

    def forward(self, pixel_values: Tensor, hidden: Tensor) -> Tensor:
        """pixel_values (1, channels, height, width), normalised, and hidden (1, rows * cols), bool -> the prediction as
        people are shown it, (1, 1 or 3, height, width) in [0, 1]."""
        if self.drops:
            predicted = self._predict(pixel_values, hidden)
        else:
            _, encoded = self.model._encode(pixel_values, hidden)
            predicted = self.model.decoder(encoded, hidden, self.grid, "all")
        return self.model.target.to_image(predicted, pixel_values, self.grid, hidden)

    def _predict(self, pixel_values: Tensor, hidden: Tensor) -> Tensor:
        encoder, decoder = self.model.mim.encoder, self.model.decoder
        prefix = encoder.num_prefix_tokens
        tokens, _, _ = encoder._embed(pixel_values, None, self.grid)
        shared, rotary = encoder._attention_positions(self.grid, None, tokens.device)
        unseen = F.pad(hidden, (prefix, 0))[:, None, None] * torch.tensor(FAR)
        for index, layer in enumerate(encoder.layers):
            bias = unseen if shared is None else unseen + shared
            if len(encoder.relative):
                bias = bias + encoder.relative[index](self.grid, prefix, None)
            tokens, _ = layer(tokens, bias, rotary)
        tokens = decoder.embed(encoder.final_norm(tokens), self.grid)
        patches = torch.where(hidden[..., None], decoder.mask_token, tokens[:, prefix:])
        patches = patches + decoder.positions(self.grid, tokens.device)
        tokens = torch.cat([tokens[:, :prefix], patches], dim=1)
        for layer in decoder.layers:
            tokens, _ = layer(tokens)
        return decoder.head(decoder.norm(tokens[:, prefix:]))


def to_onnx(model: PaintedModel) -> bytes:
    """The graph with its weights, inputs `pixel_values` and `hidden`, output `prediction`.

    Raises:
        UserError: a package is not installed.
    """
    import contextlib
    import io
    import logging
    import tempfile
    import warnings
    from pathlib import Path

    check_packages("a page", ONNX, "onnx")
    pixel_values = torch.zeros(1, model.model.config.num_channels, *model.size)
    hidden = torch.arange(model.grid[0] * model.grid[1])[None] % 2 == 0
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        try:
            torch.onnx.export(
                model,
                (pixel_values, hidden),
                path,
                input_names=["pixel_values", "hidden"],
                output_names=["prediction"],
                dynamo=True,
                external_data=False,
            )
        finally:
            logger.setLevel(level)
        return path.read_bytes()
