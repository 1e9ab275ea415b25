"""The poolers with parameters, every token by itself, in float64."""

import math

import pytest
import torch
from helpers import perturb, tiny_config
from test_poolers import GRID, pooler_of
from torch import Tensor, nn

from hf_mim import MIMModel
from hf_mim.modeling.parts import make_encoder, make_pooler


def layer_norm(vector: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = vector - vector.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt() * norm.weight + norm.bias


def weighted(logits: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of the values, weighed by a softmax written out."""
    powers = [math.exp(float(logit)) for logit in logits]
    weights = [power / sum(powers) for power in powers]
    return sum(weight * value for weight, value in zip(weights, values)), torch.tensor(weights, dtype=torch.float64)


def sincos_of(grid: tuple[int, int], dim: int, base: tuple[int, int]) -> list[Tensor]:
    table = []
    for row in range(grid[0]):
        for col in range(grid[1]):
            vector = []
            for place, cells, own in ((col, base[1], grid[1]), (row, base[0], grid[0])):
                angles = [((place + 0.5) * cells / own - 0.5) / 10000 ** (i / (dim // 4)) for i in range(dim // 4)]
                vector += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            table.append(torch.tensor(vector, dtype=torch.float64))
    return table


def abmilp_by_loops(pooler, tokens: Tensor, prefix: int, o: dict) -> tuple[Tensor, Tensor]:
    everything = o.get("content") == "all"
    values = seen = list(tokens if everything else tokens[prefix:])
    if pooler.qkv is not None:
        q, k, v = pooler.qkv.weight.chunk(3)
        attended = [weighted([(q @ x) @ (k @ y) / len(x) ** 0.5 for y in seen], [v @ y for y in seen])[0] for x in seen]
        seen = [pooler.proj.weight @ x + pooler.proj.bias for x in attended]
        values = seen if o["self_attention"] == "both" else values
    if o.get("position") == "sincos":
        table = sincos_of(GRID, len(tokens[0]), (4, 4))
        seen = [x if i < len(seen) - 15 else x + table[i - len(seen) + 15] for i, x in enumerate(seen)]
    logits = []
    for x in seen:
        for i, layer in enumerate(pooler.hidden):
            inner = layer.weight @ x + layer.bias
            inner = inner.clamp(min=0) if o.get("activation") == "relu" else inner.tanh()
            if o.get("gated"):
                inner = inner / (1 + (-(pooler.gates[i].weight @ x + pooler.gates[i].bias)).exp())
            x = inner
        logits.append(pooler.score[0] @ x + pooler.score_bias[0])
    vector, weights = weighted(logits, values)
    weights = weights[-15:]
    return vector, weights / weights.sum()


def attention_by_loops(pooler, tokens: Tensor, prefix: int, o: dict) -> tuple[Tensor, Tensor]:
    form, heads = o["form"], pooler.num_heads
    keys = values = list(tokens[prefix:])
    if form == "aim":
        norm = pooler.batch_norm
        keys = values = [(x - norm.running_mean) / (norm.running_var + 1e-6).sqrt() for x in keys]
    elif form == "cae":
        keys, values = ([layer_norm(x, pooler.norms[i]) for x in keys] for i in (1, 2))
    else:
        keys = values = [layer_norm(x, pooler.norms[0]) for x in keys]
    vectors, rows = [], []
    for learned in pooler.queries:
        query = layer_norm(learned, pooler.norms[0]) if form == "cae" else learned
        query = query if form == "aim" else pooler.query.weight @ query + pooler.query.bias
        keyed = [pooler.key @ x + (pooler.key_bias if form == "vjepa" else 0) for x in keys]
        valued = [pooler.value @ x + (0 if form == "aim" else pooler.value_bias) for x in values]
        width, parts = len(query) // heads, []
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            part, row = weighted([query[own] @ k[own] / width**0.5 for k in keyed], [v[own] for v in valued])
            parts.append(part)
            rows.append(row)
        out = torch.cat(parts)
        if form != "aim":
            out = pooler.proj.weight @ out + pooler.proj.bias
        if form == "vjepa":
            out, mlp = out + learned, pooler.mlp
            inner = mlp.fc1.weight @ layer_norm(out, pooler.norms[1]) + mlp.fc1.bias
            inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
            out = out + mlp.fc2.weight @ inner + mlp.fc2.bias
        vectors.append(out)
    return sum(vectors) / len(vectors), torch.stack(rows)


def simpool_by_loops(pooler, tokens: Tensor, prefix: int, o: dict) -> tuple[Tensor, Tensor]:
    patches, gamma = list(tokens[prefix:]), o.get("gamma")
    normed = [layer_norm(x, pooler.norm) for x in patches]
    query = pooler.query.weight @ (sum(patches) / len(patches))
    logits = [query @ (pooler.key @ x) / len(query) ** 0.5 for x in normed]
    if gamma is None:
        return weighted(logits, normed)
    lowest = min(float(x.min()) for x in normed)
    vector, weights = weighted(logits, [(x - lowest + 1e-6) ** gamma for x in normed])
    return vector ** (1 / gamma), weights


def efficient_by_loops(pooler, tokens: Tensor, prefix: int, o: dict) -> tuple[Tensor, Tensor]:
    patches, parts, rows = list(tokens[prefix:]), [], []
    chunk = pooler.out_dim // o["num_queries"]
    for i, query in enumerate(pooler.queries):
        values = [(pooler.value @ x)[i * chunk : (i + 1) * chunk] for x in patches]
        part, row = weighted([query @ x / len(query) ** 0.5 for x in patches], values)
        parts.append(part)
        rows.append(row)
    return torch.cat(parts), torch.stack(rows)


LEARNED = [
    ("abmilp", {}, abmilp_by_loops),
    ("abmilp", {"depth": 3, "activation": "relu", "position": "sincos"}, abmilp_by_loops),
    ("abmilp", {"depth": 2, "self_attention": "map", "content": "all"}, abmilp_by_loops),
    ("abmilp", {"self_attention": "both", "content": "all", "position": "sincos"}, abmilp_by_loops),
    ("abmilp", {"depth": 2, "gated": True, "hidden_size": 7}, abmilp_by_loops),
    ("attention", {"form": "aim", "num_queries": 2}, attention_by_loops),
    ("attention", {"form": "cae", "num_heads": 4}, attention_by_loops),
    ("attention", {"form": "vjepa", "num_heads": 2, "num_queries": 3}, attention_by_loops),
    ("simpool", {}, simpool_by_loops),
    ("simpool", {"gamma": 1.25}, simpool_by_loops),
    ("efficient", {"num_queries": 4}, efficient_by_loops),
    ("efficient", {"num_queries": 3, "d_out": 2}, efficient_by_loops),
]


@pytest.mark.parametrize(
    "name, options, by_hand", LEARNED, ids=lambda value: str(value) if isinstance(value, str | dict) else ""
)
def test_a_learned_pooler_against_loops_in_float64(name, options, by_hand):
    torch.manual_seed(0)
    wide = {"hidden_size": 24, "num_register_tokens": 2}
    config = tiny_config(encoder_config=wide, pooler=name, pooler_config=options)
    pooler = perturb(make_pooler(config, make_encoder(config)), 0.4).eval()
    for module in pooler.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    tokens = torch.randn(2, 3 + 15, 24)
    with torch.no_grad():
        vector, weights = pooler(tokens, 3, GRID)
        exact = pooler.double()
        for i in range(2):
            wanted, wanted_weights = by_hand(exact, tokens[i].double(), 3, options)
            assert torch.allclose(vector[i].double(), wanted, rtol=1e-4, atol=2e-5)
            assert torch.allclose(weights[i].double(), wanted_weights, atol=2e-6)


class WithAnAddition(nn.Module):
    """What LoRA does to a layer: something is added to what its weight makes."""

    def __init__(self, layer: nn.Linear, rank: int = 2):
        super().__init__()
        self.layer, self.down = layer, nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("position", ["none", "sincos"])
@pytest.mark.parametrize("self_attention", ["map", "both"])
@pytest.mark.parametrize("depth, gated, grid", [(1, False, (3, 5)), (3, True, (3, 5)), (2, False, (23, 23))], ids=str)
def test_self_attention_of_abmilp_in_training_is_that_of_evaluation(position, self_attention, depth, gated, grid):
    """Its matrices are multiplied with each other there: vectors, weights and gradients are the same, to 1e-9."""
    shape = {"position": position, "self_attention": self_attention, "depth": depth, "gated": gated}
    pooler, dim = pooler_of("abmilp", content="all", **shape)
    pooler.qkv, pooler.proj = WithAnAddition(pooler.qkv), WithAnAddition(pooler.proj)
    pooler = perturb(pooler.double(), 0.3)
    length = 3 + grid[0] * grid[1]
    images = 4 * dim // length + 1  # fewer tokens are not worth it
    tokens = torch.randn(images, length, dim, dtype=torch.float64, requires_grad=True)
    results = []
    for training in (False, True):
        vector, weights = pooler.train(training)(tokens, 3, grid)
        loss = (vector * torch.arange(dim)).sum() + (weights * torch.arange(weights.shape[1]) ** 2).sum()
        results.append((vector, weights, *torch.autograd.grad(loss, [tokens, *pooler.parameters()])))
    for evaluated, trained in zip(*results, strict=True):
        assert (trained - evaluated).norm() <= 1e-9 * (1 + evaluated.norm())


def test_the_batch_norm_of_aim_learns_the_statistics_of_tokens():
    """One training step with the momentum of torch's default, 0.1: over all patches of all images, prefix left out."""
    pooler, dim = pooler_of("attention")
    tokens = torch.randn(4, 18, dim) * 3 + 1
    pooler.train()(tokens, 3, GRID)
    patches = tokens[:, 3:].reshape(-1, dim)
    assert torch.allclose(pooler.batch_norm.running_mean, 0.1 * patches.mean(0), atol=1e-5)
    assert torch.allclose(pooler.batch_norm.running_var, 0.9 + 0.1 * patches.var(0), atol=1e-4)


@pytest.mark.parametrize(
    "name, options, count",
    [
        ("cls", {}, 0),
        ("mean", {}, 0),
        ("max", {}, 0),
        ("central", {}, 0),
        ("cls_attention", {}, 0),
        ("gem", {}, 1),
        ("abmilp", {}, 769),
        ("abmilp", {"depth": 2}, 591_361),
        ("abmilp", {"depth": 2, "self_attention": "both"}, 591_361 + 4 * 768**2 + 768),
        ("abmilp", {"depth": 2, "hidden_size": 128}, 128 * 768 + 128 + 128 + 1),
        ("abmilp", {"depth": 2, "hidden_size": 128, "gated": True}, 2 * (128 * 768 + 128) + 128 + 1),
        ("simpool", {}, 1_181_184),
        ("attention", {"form": "aim"}, 1_180_416),
        ("attention", {"form": "cae"}, 4 * 768**2 + 10 * 768),
        ("attention", {"form": "vjepa"}, 7_088_640),
        ("efficient", {"num_queries": 32}, 614_400),
        ("efficient", {"num_queries": 32, "d_out": 2}, 768**2 // 2 + 32 * 768),
    ],
)
def test_parameter_counts_at_width_768(name, options, count):
    config = tiny_config()
    with torch.device("meta"):
        config.encoder_config = {**config.encoder_config, "hidden_size": 768, "num_attention_heads": 12}
        config.pooler, config.pooler_config = name, options
        pooler = make_pooler(config, make_encoder(config))
    assert sum(p.numel() for p in pooler.parameters()) == count


@pytest.mark.parametrize("content", ["patch", "all"])
def test_a_new_abmilp_is_the_mean(content):
    model = MIMModel(tiny_config(pooler="abmilp", pooler_config={"depth": 2, "content": content})).eval()
    out = model(torch.randn(2, 3, 16, 16))
    tokens = out.last_hidden_state[:, 0 if content == "all" else 1 :]
    assert torch.allclose(out.pooler_output, tokens.mean(1), atol=1e-6)
    assert torch.allclose(out.pooler_weights, torch.full((2, 16), 1 / 16), atol=1e-7)


@pytest.mark.parametrize("name", ["attention", "simpool", "efficient"])
def test_zero_logits_weigh_all_patches_alike(name):
    pooler, dim = pooler_of(name)
    with torch.no_grad():
        for parameter in (pooler.key if hasattr(pooler, "key") else pooler.queries,):
            parameter.zero_()
    _, weights = pooler(torch.randn(2, 18, dim), 3, GRID)
    assert torch.allclose(weights, torch.full_like(weights, 1 / 15), atol=1e-7)


def test_positions_make_the_order_matter_and_follow_the_grid():
    pooler, dim = pooler_of("abmilp", position="sincos")
    tokens = torch.randn(2, 18, dim)
    vector, _ = pooler(tokens, 3, GRID)
    assert not torch.allclose(vector, pooler(torch.cat([tokens[:, :3], tokens[:, 3:].flip(1)], 1), 3, GRID)[0])
    assert not torch.allclose(vector, pooler(tokens, 3, (5, 3))[0])
