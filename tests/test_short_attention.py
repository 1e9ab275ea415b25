"""Attention of few tokens in Triton, which its interpreter runs on a processor: against attention in float64."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_config

from hf_mim import MIMForPreTraining
from hf_mim.modeling import attention
from hf_mim.modeling.masking import sample_masks


# In a process of its own, since Triton reads TRITON_INTERPRET when it is imported: float32 is within 1e-5.
OPERATORS = """
import torch
import hf_mim.short_attention

def relative(found, wanted):
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())

# batch, queries of their own, keys, heads, head size
SHAPES = [(2, None, 50, 3, 32), (1, None, 197, 2, 16), (2, None, 17, 1, 64), (1, None, 64, 2, 16), (1, None, 65, 1, 16),
          (2, 147, 197, 2, 16), (1, 147, 50, 2, 32), (1, 5, 70, 1, 16)]
for batch, queries, keys, heads, size in SHAPES:
    generator = torch.Generator().manual_seed(keys)
    # Logits far from zero: what a block lacks must not count.
    rest = torch.randn(batch, keys, 3 if queries is None else 2, heads, size, generator=generator) * 4
    query = None if queries is None else torch.randn(batch, queries, heads, size, generator=generator) * 4
    leaves = [part.requires_grad_() for part in (rest, query) if part is not None]
    doubles = [part.detach().double().requires_grad_() for part in leaves]
    q, k, v = doubles[0].unbind(2) if query is None else (doubles[1], *doubles[0].unbind(2))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    wanted = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)
    found, _ = torch.ops.hf_mim.short_attention(rest, query, 0.3)
    upper = torch.randn(wanted.shape, generator=generator)
    found.backward(upper)
    wanted.backward(upper.double())
    errors = [relative(found, wanted), *(relative(a.grad, b.grad) for a, b in zip(leaves, doubles, strict=True))]
    assert max(errors) < 1e-5, (keys, errors)
    torch.library.opcheck(torch.ops.hf_mim.short_attention, (rest.detach(), query, 0.3), test_utils="test_faketensor")
print("as in float64")
"""
MODELS = """
import sys
import torch
from test_short_attention import make_step
import hf_mim.short_attention
from hf_mim.modeling import layers

for decoder in ("transformer", "cross_attention"):
    found = {}
    for way in ("plain", "short", "compiled"):
        layers.takes_short = lambda *given, way=way: way != "plain"
        model, step = make_step(decoder)
        loss = step(torch.compile(model, backend="aot_eager", fullgraph=True) if way == "compiled" else model)
        loss.backward()
        found[way] = torch.cat([loss[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])
    for way in ("short", "compiled"):
        torch.testing.assert_close(found[way], found["plain"], rtol=1e-4, atol=1e-6)
print("as without")
"""


def make_step(decoder: str):
    """A model whose attention could be either, and the function of it that gives its loss."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tiny_config(encoder_config={**sizes, "mask_style": "drop"}, decoder=decoder, decoder_config=sizes)
    model = MIMForPreTraining(config).train()
    side = config.image_size
    masks = sample_masks(config, model.mask_grid(side, side), [np.random.default_rng(i) for i in range(2)])
    pixels = torch.randn(2, config.num_channels, side, side)
    return model, lambda network: network(pixel_values=pixels, bool_masked_pos=masks).loss


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("script, words", [(OPERATORS, "as in float64"), (MODELS, "as without")])
def test_it_is_attention(script, words):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == words, done.stderr[-2000:]


@pytest.mark.parametrize("decoder", ["transformer", "cross_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_processor_the_name_is_sdpa(monkeypatch, decoder, dtype):
    taken = []
    plain = attention.eager_attention
    monkeypatch.setattr(attention, "eager_attention", lambda *given, **named: taken.append(1) or plain(*given, **named))
    model, step = make_step(decoder)
    found = []
    for name in ("sdpa", attention.SHORT):
        model.set_attn_implementation(name)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
            found.append((step(model), len(taken)))
        taken.clear()
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] == (2 if dtype == torch.bfloat16 else 0)  # of the encoder and of the decoder


@pytest.mark.parametrize(
    "changes, taken",
    [
        ({}, True),
        ({"name": "sdpa"}, False),
        ({"is_cuda": False}, False),
        ({"dtype": torch.float32}, False),
        ({"shape": (2, 257, 3, 4, 32)}, False),
        ({"shape": (2, 50, 3, 4, 80)}, False),
        ({"capability": (7, 5)}, False),
    ],
)
def test_where_it_applies(monkeypatch, changes, taken):
    class Device:
        is_cuda, dtype, shape, device = True, torch.bfloat16, (2, 50, 3, 4, 32), torch.device("cuda")
        name, capability = attention.SHORT, (9, 0)

    for name, value in changes.items():
        setattr(Device, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(attention.importlib, "import_module", lambda *given: None)  # where Triton is not installed too
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: Device.capability)
    module = type("Module", (), {"config": type("Config", (), {"_attn_implementation": Device.name})})
    with pytest.warns(match="needs a GPU of NVIDIA") if "capability" in changes else contextlib.nullcontext():
        assert attention.takes_short(module, Device) is taken
