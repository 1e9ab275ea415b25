"""The comparison of probing at a reduced size: that it runs, and that its sums are right. Never how fast."""

import json

import numpy as np
import probing
import pytest
import torch


def test_probing(tmp_path, capsys):
    page, numbers = tmp_path / "benchmarks.md", tmp_path / "numbers.json"
    results = probing.main(["--reduced", "--out", str(page), "--json", str(numbers)])
    assert set(results) == set(probing.SETS)
    for found in results.values():
        assert set(found["views"]) == {1, 10}
        for low, middle, high in (found["peer"], found["encode"], found["views"][10]["ours"]):
            assert 0 < low <= middle <= high
    assert capsys.readouterr().out.strip() in page.read_text() and "On paper" in page.read_text()
    paper = json.loads(numbers.read_text())["paper"]
    # 16 patches and the class token of 32 channels in two bytes each; vectors in four.
    assert paper["tokens"] == 1_000_000 * 17 * 32 * 2 and paper["vectors"] == 1_000_000 * 32 * 4


def test_whole_runs_are_sums_of_their_parts():
    times = {"peer a": [0.1, 0.2], "peer b": [0.3, 0.4], "encode": [0.05, 0.06], "epoch 1": [2, 3], "epoch 10": [4, 4]}
    found = probing.summary(times, chunk=64, count=640, rounds=2)
    peer, encode = 90 * 10 * np.array([0.4, 0.6]), 10 * np.array([0.05, 0.06])
    assert found["peer"][1] == pytest.approx(np.median(peer))
    ours = 10 * encode + 90 * np.array([4, 4])
    assert found["views"][10]["ratio"][1] == pytest.approx(np.median(peer / ours))


def test_both_arms_train_the_same_head_on_the_same_tokens(tmp_path):
    model = probing.frozen(probing.test_config())
    features, pixels = probing.Features(model, [2]), torch.randn(8, 3, 32, 32)
    source = probing.fake_cache(features, pixels, 24, 2, tmp_path)
    tokens = source.fetch(1, torch.arange(24))["tokens/2"]
    fresh = probing.Fresh(features, pixels).fetch(0, torch.arange(8))["tokens/2"]
    torch.testing.assert_close(tokens, fresh.repeat(3, 1, 1), rtol=2**-7, atol=1e-4)
