"""Where `model.init_from` may point: official files, web servers, ids on the Hub; and what is refused, with the remedy,
before anybody waits for a network."""

import functools
import http.server
import json
import socket
import threading

import pytest
import timm
import torch
import transformers
from hub_client import Worker, environment
from hub_server import Hub
from safetensors.torch import save_file
from test_adapt import WIDE, library_model, own_features, save, section
from test_reference import EXACT, case, official_file

from hf_mim import MIMConfig
from hf_mim.training import checkpoint
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import start_model
from hf_mim.training.common import hub_reach
from hf_mim.training.common.errors import UserError


def start(source) -> tuple[torch.nn.Module, list[str]]:
    return start_model(section(str(source), "quick"))


def refusal(source) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        start(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- files of other projects ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "expected"), [("simmim_vit", "latent_map_unmasked"), ("beit2", "features_unmasked"), ("mae", None)]
)
@torch.no_grad()
def test_an_official_file_gives_the_features_of_its_program(name, expected, tmp_path):
    inputs, outputs = case(name)
    file = official_file(name, tmp_path)
    model, lines = start_model(section(str(file), "simmim", "model.image_size=32", "model.masking_config.unit=1"))
    assert lines[0].startswith(f"start: {file}, ") and "as our encoder 'vit', with a new decoder" in lines[0]
    if expected is None:  # its program has other heads than are usual at its width, which the file does not say
        assert any("attention heads are assumed" in line for line in lines)
        assert checkpoint.CONVERT_FIRST in lines
        return
    features = model.eval().mim(inputs["pixels"]).last_hidden_state
    wanted = outputs[expected]
    if wanted.ndim == 4:  # a map of the patches
        features, wanted = features[:, -wanted[0, 0].numel() :], wanted.flatten(2).transpose(1, 2)
    torch.testing.assert_close(features, wanted, **EXACT)


def test_a_file_that_needs_options_of_convert_says_so(tmp_path):
    message = refusal(official_file("beyond_cls_head", tmp_path))
    assert "convert it first, by hf-mim convert: " in message and "--encoder FILE" in message


# ---- a web server --------------------------------------------------------------------------------------------------
@pytest.fixture
def web(tmp_path):
    (tmp_path / "web").mkdir()
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    handler = functools.partial(quiet, directory=str(tmp_path / "web"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("family", ["dinov2", "timm_vit", "resnet"])
@torch.no_grad()
def test_a_folder_on_a_web_server(web, family, tmp_path):
    pytest.importorskip("aiohttp")
    save(family, tmp_path / "web" / family)
    model, lines = start(f"{web}/{family}")
    assert lines[0].startswith(f"start: {web}/{family}, ")
    images = torch.randn(2, 3, 64, 64)
    expected = own_features(library_model(family), images)
    torch.testing.assert_close(model.eval().mim(images).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_what_is_refused_of_a_web_server(web, tmp_path):
    pytest.importorskip("aiohttp")
    official_file("mae", tmp_path / "web")
    assert "mae.pth is a single file, and folders alone are fetched: download it" in refusal(f"{web}/mae.pth")
    assert f"no checkpoint at {web}/nothing" in refusal(f"{web}/nothing")
    (tmp_path / "web" / "bare").mkdir()
    (tmp_path / "web" / "bare" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "no weights as safetensors" in refusal(f"{web}/bare")


# ---- names ---------------------------------------------------------------------------------------------------------
RESNET18 = timm.get_pretrained_cfg("resnet18").hf_hub_id


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        ("timm:resnet18", f"a name of timm: its weights are {RESNET18} on the Hub"),
        ("resnet18", f"a name of timm: its weights are {RESNET18} on the Hub"),
        ("hf-hub:timm/resnet18.a1_in1k", "leave out 'hf-hub:' and write timm/resnet18.a1_in1k"),
        ("local-dir:photos", "leave out 'local-dir:' and write photos"),
        ("mae_pretrain_vit_base.pth", "there is no such file"),
        ("./runs/mae.safetensors", "there is no such file"),
        ("./runs/mae", "there is no such folder"),
    ],
)
def test_other_forms_of_names_are_refused_with_the_remedy(source, remedy, monkeypatch):
    monkeypatch.setattr(checkpoint, "config_fields", None)  # nobody asks the Hub
    assert remedy in refusal(source)


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def online(monkeypatch):
    """As of a user who has a network, with a Hub at a port of this machine."""
    monkeypatch.setattr(hub_reach, "PAUSE", 0)
    monkeypatch.setattr(hub_reach.urllib.request, "getproxies", dict)
    monkeypatch.setattr(hub_reach.constants, "HF_HUB_OFFLINE", False)

    def at(port: int):
        monkeypatch.setattr(hub_reach.constants, "ENDPOINT", f"http://127.0.0.1:{port}")

    return at


def test_without_a_hub_it_says_so_at_once(online, monkeypatch):
    online(free_port())
    monkeypatch.setattr(checkpoint, "config_fields", None)  # its client would try for half a minute
    message = refusal("facebook/dinov2-base")
    assert "no checkpoint at facebook/dinov2-base: there is nothing of this name here, and the Hub at http" in message
    assert message.endswith("cannot be reached")


def test_the_hub_is_asked_where_it_may_answer(online, port, monkeypatch):
    online(port)
    assert not hub_reach.is_out_of_reach("me/model")  # something listens
    online(free_port())
    assert hub_reach.is_out_of_reach("me/model")
    monkeypatch.setattr(hub_reach, "is_cached", lambda name: True)
    assert not hub_reach.is_out_of_reach("me/model")  # in the cache
    monkeypatch.setattr(hub_reach, "is_cached", lambda name: False)
    monkeypatch.setattr(hub_reach.urllib.request, "getproxies", lambda: {"http": "http://proxy:3128"})
    assert not hub_reach.is_out_of_reach("me/model")  # the proxy knows the way
    monkeypatch.setattr(hub_reach.urllib.request, "getproxies", dict)
    monkeypatch.setattr(hub_reach.constants, "HF_HUB_OFFLINE", True)
    assert not hub_reach.is_out_of_reach("me/model")  # the client looks into its cache alone


# ---- the Hub -------------------------------------------------------------------------------------------------------
UPLOAD = """
from huggingface_hub import HfApi
for name in {names}:
    HfApi().create_repo("me/" + name)
    HfApi().upload_folder(repo_id="me/" + name, folder_path=name)
"""
FEATURES = """
import torch
from hf_mim import MIMForPreTraining
torch.save(MIMForPreTraining.from_pretrained({run!r}).eval().mim(torch.load("images.pt")).last_hidden_state, {out!r})
"""
STEP = ["training.max_steps=1", "training.learning_rate=0", "training.watch_every=0", "training.bf16=false"]
STEP += ["data.max_train_images=16", "data.max_eval_images=0", "training.per_device_train_batch_size=8"]
STEP += ["model.image_size=64", "model.decoder_config.hidden_size=16", "model.decoder_config.num_attention_heads=2"]


@pytest.mark.slow  # an import of torch and transformers in another process
@torch.no_grad()
def test_ids_on_the_hub(tmp_path):
    """Of a model of transformers, one of timm, and a checkpoint of this project that a run has pushed."""
    names = ["clip", "timm_vit"]
    for name in names:
        save(name, tmp_path / name)
    images = torch.randn(2, 3, 64, 64)
    torch.save(images, tmp_path / "images.pt")
    (tmp_path / "xet").mkdir()
    with Hub(tmp_path / "xet") as hub:
        worker = Worker(environment(hub, tmp_path / "home"), tmp_path)
        worker.good(UPLOAD.format(names=names))
        for name in names:
            run = ["pretrain", "quick", f"model.init_from=me/{name}", *STEP, f"training.output_dir=run_{name}"]
            assert f"start: me/{name}, " in worker.good(run)
            worker.good(["push", f"run_{name}", f"me/run_{name}"])
            again = ["pretrain", "quick", f"model.init_from=me/run_{name}", *STEP, f"training.output_dir=more_{name}"]
            assert "its decoder too" in worker.good(again)
            worker.good(FEATURES.format(run=f"more_{name}", out=f"{name}.pt"))
            expected = own_features(library_model(name), images)
            torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), expected, rtol=0, atol=1e-5)
        said = worker.refused("pretrain", "quick", "model.init_from=me/none", "training.output_dir=none")
        assert "no repository me/none" in said
        worker.close()


# ---- bad input -----------------------------------------------------------------------------------------------------
def bert(folder):
    sizes = {name: WIDE[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)


def unknown(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "visionary"}))


def untyped(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8}))


def classifier(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "no_such_net"}))
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (bert, "'bert' model, which takes no images: it has no vision tower"),
        (unknown, "'visionary', which transformers does not know"),
        (untyped, "names no model type"),
        (classifier, "no_such_net"),
        (lambda folder: None, "no checkpoint at"),
    ],
)
def test_what_is_no_vision_model_is_refused_in_a_line(make, words, tmp_path):
    make(tmp_path / "source")
    with pytest.raises((UserError, ValueError), match=words) as caught:
        start_model(section(str(tmp_path / "source"), "quick"))
    assert "\n" not in str(caught.value)


def test_a_patch_that_does_not_fit_and_a_size_that_a_class_does_not_take(tmp_path):
    with pytest.raises(ValueError, match="28x28 is not divisible by the patch 16x16.*model.image_size=64"):
        start_model(section(save("vit", tmp_path / "vit"), "quick", "model.image_size=28"))
    with pytest.raises(ValueError, match="its class does not take images of 96x96.*model.image_size=64"):
        start_model(section(save("aimv2", tmp_path / "aimv2"), "quick", "model.image_size=96"))


def test_other_weights_than_the_config_says_are_refused(tmp_path):
    model = library_model("vit")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="which the config asks for"):
        start_model(section(str(tmp_path), "quick"))


def test_origin_is_not_an_option_of_recipes():
    with pytest.raises(ValueError, match="origin"):
        recipes.resolve("quick", ["model.origin={}"])
    assert MIMConfig().origin is None
