"""Pushing to and loading from the Hub: the real client in fresh processes, against the server of hub_server.py."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_config
from hub_client import LOAD, ROOT, SAME, Worker, environment
from hub_server import OWNER, READER, Hub
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image

from hf_mim import MIMBackbone, MIMForImageClassification, MIMForPreTraining, MIMModel
from hf_mim.modeling.modeling_upernet import MIMUperNet, MIMUperNetConfig
from hf_mim.training.data.processors import processor_for


BARE = Path(__file__).parent / "fixtures" / "checkpoint_v1"  # neither code nor card
pytestmark = pytest.mark.slow  # an import of torch and transformers in each of a few processes


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(place):
    (place / "xet").mkdir()
    with Hub(place / "xet") as hub:
        yield hub


@pytest.fixture(scope="module")
def worker(hub, place):
    worker = Worker(environment(hub, place / "home"), place)
    yield worker
    worker.close()


def save_run(folder: Path, seed: int) -> MIMForPreTraining:
    """What a run leaves, in small: a checkpoint, a processor, a recipe, results and a picture."""
    torch.manual_seed(seed)
    model = MIMForPreTraining(tiny_config()).eval()
    model.save_pretrained(folder)
    processor_for(model.config).save_pretrained(folder)
    recipe = (
        f"# A run\n#\n# Paper: arXiv:2111.06377 (MAE)\nmodel:\n  image_size: 16\ndata:\n  dataset: {folder}/photos\n"
    )
    (folder / "recipe.yaml").write_text(recipe + "training:\n  hub_token: hf_secret\n")
    (folder / "metrics.json").write_text(json.dumps({"trained": {"knn_mean": 50.0}, "seed": seed}))
    Image.new("L", (8, 8), seed).save(folder / "reconstructions.png")
    torch.save({"step": 1}, folder / "training_args.bin")
    return model


@pytest.fixture(scope="module")
def runs(place) -> dict[str, MIMForPreTraining]:
    return {name: save_run(place / name, seed) for seed, name in enumerate(("first", "second"))}


@pytest.fixture(scope="module")
def pushed(hub, worker, runs, place):
    """me/tiny: `first` at the tag v1, then `second`; me/classifier and me/adapter by their own push_to_hub, at the tag
    v1 with doubled weights."""
    assert worker.good(["push", "first", "tiny", "--tag", "v1"]).strip() == f"{hub.url}/me/tiny"
    worker.good(["push", "second", "me/tiny", "--license", "mit"])
    torch.manual_seed(3)
    classifier = MIMForImageClassification(tiny_config(num_labels=3)).eval()
    classifier.save_pretrained(place / "classifier")
    processor_for(classifier.config).save_pretrained(place / "classifier")
    adapted = get_peft_model(MIMModel.from_pretrained(place / "second"), LoraConfig(target_modules="all-linear", r=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(place / "adapter")
    worker.good(PUSH_BOTH)
    old = copy.deepcopy(classifier)
    old_adapted = PeftModel.from_pretrained(MIMModel.from_pretrained(place / "first"), place / "adapter").eval()
    double(old.classifier, "weight")
    double(old_adapted, "lora_B")
    new = {"classifier": classifier, "adapter": adapted.eval()}
    return {**runs, **new, "old classifier": old, "old adapter": old_adapted}


@torch.no_grad()
def double(module: torch.nn.Module, part: str) -> None:
    for name, parameter in module.named_parameters():
        if part in name:
            parameter.mul_(2)


# The doubled weights first, under a tag; then as they are.
PUSH_BOTH = """
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

classifier = AutoModelForImageClassification.from_pretrained("classifier")
adapted = PeftModel.from_pretrained(AutoModel.from_pretrained("second"), "adapter")
parts = [classifier.classifier.weight, *(p for name, p in adapted.named_parameters() if "lora_B" in name)]
for factor in (2, 0.5):
    for parameter in parts:
        parameter.data *= factor
    classifier.push_to_hub("me/classifier")
    AutoImageProcessor.from_pretrained("classifier").push_to_hub("me/classifier")
    adapted.push_to_hub("me/adapter")
    for name in ("me/classifier", "me/adapter") if factor == 2 else ():
        HfApi().create_tag(name, tag="v1")
"""


# ---- pushing ---------------------------------------------------------------------------------------------------------
def test_a_push_sends_what_loading_takes_and_nothing_else(hub, pushed, place):
    files = hub.files("me/tiny", "v1")
    code = {path.name for path in (ROOT / "modeling").glob("*.py")} - {"__init__.py", "modeling_upernet.py"}
    code -= {"image_processing_mim.py", "pixels.py", "resizing.py"}  # a stock processor makes these images
    others = {".gitattributes", "README.md", "config.json", "metrics.json", "model.safetensors"}
    assert set(files) == code | others | {"preprocessor_config.json", "recipe.yaml", "reconstructions.png"}
    assert files["model.safetensors"] == (place / "first" / "model.safetensors").read_bytes()
    assert len(json.loads(files["config.json"])["auto_map"]) == 6
    card = files["README.md"].decode()
    assert "![test images" in card and "knn" not in card.lower().replace("k-nn", "") and "license" not in card
    assert "license: mit" in hub.files("me/tiny")["README.md"].decode()
    for name, content in files.items():
        assert str(place).encode() not in content and b"hf_secret" not in content, name
    assert "dataset: photos" in files["recipe.yaml"].decode()


def test_nothing_is_sent_twice(hub, worker, pushed):
    worker.good(["push", "first", "me/again"])
    sent = len(hub.log)
    assert "there already" in worker.good(["push", "first", "me/again"])
    assert not [line for line in hub.log[sent:] if line.startswith("PUT") or "/commit/" in line]


def test_private_branch_tag_and_pull_request(hub, worker, runs):
    worker.good(["push", "first", "me/hidden", "--private"])
    worker.good(["push", "second", "me/hidden", "--revision", "dev", "--tag", "v2"])
    assert "/discussions/1" in worker.good(["push", "second", "me/hidden", "--pr"])
    refs = hub.repos["me/hidden"].refs
    assert set(refs) == {"refs/heads/main", "refs/heads/dev", "refs/tags/v2", "refs/pr/1"}
    assert hub.repos["me/hidden"].private
    assert refs["refs/tags/v2"] == refs["refs/heads/dev"] != refs["refs/heads/main"]
    assert "has a tag v2 of another commit" in worker.refused("push", "first", "me/hidden", "--tag", "v2")
    assert "takes neither" in worker.refused("push", "first", "me/hidden", "--pr", "--tag", "v3")


def test_a_push_survives_a_server_that_fails_for_a_moment(hub, worker, place):
    save_run(place / "third", 7)
    hub.fail = [("PUT /lfs/", 500, 1), ("POST /lfs/.*/verify", "cut", 1)]
    worker.good(["push", "third", "me/shaky"])
    assert hub.requests("PUT /lfs/.* 500") and hub.requests("verify cut")
    assert hub.files("me/shaky")["model.safetensors"]


def test_an_interrupted_push_of_shards_continues(hub, worker, place):
    model = save_run(place / "fourth", 8)
    (place / "fourth" / "model.safetensors").unlink()
    model.save_pretrained(place / "fourth", max_shard_size="20kB")
    hub.fail = [("PUT /lfs/", None, 1), ("PUT /lfs/", 501, 99)]
    said = worker.refused("push", "fourth", "me/broken")
    assert "status 501" in said and "run the same command again" in said
    hub.fail, first = [], hub.requests("PUT /lfs/.* 200")[-1]
    sent = len(hub.log)
    worker.good(["push", "fourth", "me/broken"])
    again = [line for line in hub.log[sent:] if line.startswith("PUT")]
    shards = {name: data for name, data in hub.files("me/broken").items() if name.startswith("model-")}
    assert len(shards) > 1 and all(shards.values()) and again and first not in again
    worker.good(SAME.format(one="me/broken", other="fourth"))


def test_a_push_makes_the_repository_what_the_folder_is(hub, worker, place):
    """Weights in shards replace the whole file, which transformers would load first; results of before go as well."""
    model = save_run(place / "sixth", 10)
    worker.good(["push", "sixth", "me/changing"])
    for name in ("model.safetensors", "metrics.json", "reconstructions.png"):
        (place / "sixth" / name).unlink()
    with torch.no_grad():
        model.mim.encoder.patch_embedding.weight.add_(1)
    model.save_pretrained(place / "sixth", max_shard_size="20kB")
    commits = len(hub.repos["me/changing"].commits)
    worker.good(["push", "sixth", "me/changing"])
    assert len(hub.repos["me/changing"].commits) == commits + 1
    files = hub.files("me/changing")
    assert not {"model.safetensors", "metrics.json", "reconstructions.png"} & set(files) and "recipe.yaml" in files
    worker.good(SAME.format(one="me/changing", other="sixth"))
    # And back.
    for path in (place / "sixth").glob("model*"):
        path.unlink()
    model.save_pretrained(place / "sixth")
    worker.good(["push", "sixth", "me/changing"])
    files = {name for name in hub.files("me/changing") if name.startswith("model")}
    assert {name for name in files if not name.endswith(".py")} == {"model.safetensors"}


def test_what_was_edited_on_the_hub_stays(hub, worker, place):
    save_run(place / "seventh", 11)
    worker.good(["push", "seventh", "me/edited", "--license", "mit"])
    (place / "seventh" / "metrics.json").write_text(json.dumps({"seed": 77}))
    worker.good(["push", "seventh", "me/edited"])  # nobody touched the card: a new one, with the licence of before
    card = hub.files("me/edited")["README.md"].decode()
    assert "license: mit" in card and "| seed | 77 |" in card
    edit = "from huggingface_hub import HfApi\n"
    edit += "HfApi().upload_file(path_or_fileobj=b'---\\nlicense: mit\\n---\\n# By hand\\n', path_in_repo='README.md', "
    edit += "repo_id='me/edited', commit_message='by hand')"
    worker.good(edit)
    (place / "seventh" / "metrics.json").write_text(json.dumps({"seed": 78}))
    for _ in range(2):
        code, _, err = worker(["push", "seventh", "me/edited"])
        assert code == 0 and "README.md was edited on the Hub" in err
        files = hub.files("me/edited")
        assert b"# By hand" in files["README.md"] and b"78" in files["metrics.json"]
    worker.good(["push", "seventh", "me/edited", "--force"])
    assert "| seed | 78 |" in hub.files("me/edited")["README.md"].decode()


def test_a_revision_is_a_branch(hub, worker, runs):
    worker.good(["push", "first", "me/revisions", "--tag", "v1"])
    commit = hub.repos["me/revisions"].refs["refs/tags/v1"]
    before = dict(hub.repos["me/revisions"].refs)
    assert "is a tag of me/revisions" in worker.refused("push", "second", "me/revisions", "--revision", "v1")
    for name in (commit, commit[:8]):
        assert "is a commit" in worker.refused("push", "second", "me/revisions", "--revision", name)
    assert hub.repos["me/revisions"].refs == before


def test_a_bare_checkpoint_gets_what_it_lacks(hub, worker):
    worker.good(["push", str(BARE), "me/bare"])
    assert {"modeling_mim.py", "preprocessor_config.json", "README.md"} <= set(hub.files("me/bare"))
    worker.good(SAME.format(one="me/bare", other=BARE))


def test_a_segmentation_model_is_pushed(hub, worker, place):
    config = MIMUperNetConfig(backbone_config=tiny_config(), hidden_size=8, use_auxiliary_head=False, num_labels=3)
    MIMUperNet(config).save_pretrained(place / "segmentation")
    worker.good(["push", "segmentation", "me/segmentation"])
    assert {"modeling_upernet.py", "model.safetensors"} <= set(hub.files("me/segmentation"))


def test_what_the_hub_refuses_is_said_in_one_line(hub, worker, pushed, place):
    push = ("push", "first", "me/tiny", "--license", "apache-2.0")
    assert "needs a token" in worker.refused(*push, HF_TOKEN=None)
    assert "does not accept the token in HF_TOKEN" in worker.refused(*push, HF_TOKEN="hf_wrong_0123456789")
    assert "no right to write to me/tiny" in worker.refused(*push, HF_TOKEN=READER)
    assert "no right to write" in worker.refused("push", "first", "somebody/x")
    assert "exists and is public" in worker.refused("push", "first", "me/tiny", "--private")
    before = len(hub.log)
    said = worker.refused("push", "first", "me/card", "--license", "nonsense")
    assert 'card\'s metadata: "license" must be one of' in said
    assert "me/card" not in hub.repos and not [line for line in hub.log[before:] if line.startswith("PUT")]
    image = str(place / "first" / "reconstructions.png")
    assert "no repository me/none" in worker.refused("reconstruct", "me/none", image)
    worker.good(["push", "first", "me/secret", "--private"])
    said = worker.refused("reconstruct", "me/secret", image, HF_TOKEN=None)
    assert "no repository me/secret on the Hub, or no access to it with no token: log in" in said
    for token in (OWNER, READER, "hf_wrong"):
        assert token not in worker.said + worker.log.read_text()


SMALL = ["model.encoder_config.hidden_size=16", "model.encoder_config.num_hidden_layers=1", "training.max_steps=2"]
SMALL += ["data.max_train_images=32", "data.max_eval_images=20", "training.per_device_train_batch_size=8"]
SMALL += ["training.push_to_hub=true", "training.save_strategy=steps", "training.save_steps=1"]


def test_the_trainer_pushes_what_loads(hub, worker, place):
    """Also at a checkpoint, before the training ends."""
    worker.good(["pretrain", *SMALL, "training.hub_model_id=me/run", "training.output_dir=run"])
    assert not (place / "run" / "training_args.bin").exists()
    commits = list(hub.repos["me/run"].commits.items())
    assert len(commits) >= 4  # made, checkpoint, end of training, card
    for _, files in commits[1:]:
        assert {"config.json", "model.safetensors", "modeling_mim.py", "preprocessor_config.json"} <= set(files)
        assert not [path for path in files if path.endswith((".bin", ".pt", ".pth"))]
    assert {"README.md", "metrics.json", "recipe.yaml", "reconstructions.png"} <= set(commits[-1][1])
    worker.good(SAME.format(one="me/run", other="run"))
    load = "from transformers import AutoModel\nAutoModel.from_pretrained('me/run', revision='{}')"
    worker.good(load.format(commits[1][0]))
    said = worker.refused("pretrain", "training.hub_token=hf_secret")
    assert "hub_token is refused" in said and "hf_secret" not in said


def test_the_state_of_the_optimizer_stays_here(hub, worker, place):
    """It is a pickle: the strategies that would send it are refused by name."""
    before = len(hub.log)
    for strategy in ("checkpoint", "all_checkpoints"):
        wanted = [f"training.hub_strategy={strategy}", "training.hub_model_id=me/state", "training.output_dir=state"]
        said = worker.refused("pretrain", *SMALL, *wanted)
        assert f"hub_strategy={strategy} would send the optimizer's state" in said and "every_save or end" in said
    assert len(hub.log) == before and "me/state" not in hub.repos and not (place / "state").exists()


def test_xet(hub, place):
    """Uploads and downloads by Xet, the whole with debug logs, in which no token may stand."""
    env = environment(hub, place / "xet-home", HF_HUB_DISABLE_XET="0", HF_HUB_VERBOSITY="debug", HF_DEBUG="1")
    worker = Worker(env, place)
    save_run(place / "fifth", 9)
    worker.good(["push", "fifth", "me/xet"])
    assert hub.files("me/xet")["model.safetensors"] is None and hub.requests("xet-write-token")
    assert "there already" in worker.good(["push", "fifth", "me/xet"])
    worker.good(SAME.format(one="me/xet", other="fifth"))
    assert hub.requests("xet-read-token")
    worker.close()
    assert len(worker.said) > 1000 and OWNER not in worker.said
    for home in (place / "xet-home", place / "fifth"):
        for path in home.rglob("*"):
            assert not path.is_file() or OWNER.encode() not in path.read_bytes(), path


# ---- loading ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def expected(models: dict, image: Image.Image) -> dict[str, dict[str, torch.Tensor]]:
    """What each run gives for an image, computed here."""
    found = {}
    for name in ("first", "second"):
        model = models[name]
        pixels = processor_for(model.config)(image, return_tensors="pt")["pixel_values"]
        masks = torch.arange(16)[None] % 4 != 0
        tokens = model.mim(pixels).last_hidden_state
        loss = model(pixels, masks).loss
        found[name] = {"pixel_values": pixels, "tokens": tokens, "extracted": tokens}
        found[name] |= {"AutoModelForPreTraining": loss, "AutoModelForMaskedImageModeling": loss}
        backbone = MIMBackbone(model.config).eval()
        backbone.load_state_dict(model.state_dict(), strict=False)
        found[name]["backbone"] = backbone(pixels).feature_maps[-1]
    for run, which in (("first", "old "), ("second", "")):
        logits = models[f"{which}classifier"](found[run]["pixel_values"]).logits
        powers = np.exp(logits[0].numpy() - logits[0].numpy().max())  # as the pipeline does it, in numpy
        found[run] |= {"logits": logits, "scores": torch.tensor(powers / powers.sum())}
        found[run]["peft"] = models[f"{which}adapter"](found[run]["pixel_values"]).last_hidden_state
    assert not torch.equal(found["first"]["logits"], found["second"]["logits"])
    return found


def load(hub: Hub, place: Path, home: str, blocked: bool, **env: str) -> dict[str, dict[str, torch.Tensor]]:
    """{source: {what: tensor}} from a fresh process."""
    names = [["repository", "me/tiny", "me/classifier", None], ["revision", "me/tiny", "me/classifier", "v1"]]
    if not env:
        names.append(["folder", str(place / "second"), str(place / "classifier"), None])
    out = place / f"{home}-{len(env)}.pt"
    jobs = {"sources": names, "blocked": blocked, "image": str(place / "image.png"), "out": str(out)}
    jobs["adapters"] = str(place / "adapter")
    environ = environment(hub, place / home, token=None, **env)
    command = [sys.executable, "-c", LOAD]
    done = subprocess.run(
        command, cwd=place, env=environ, input=json.dumps(jobs), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("blocked", [False, True], ids=["imported", "remote code alone"])
def test_every_class_loads_from_everywhere_bit_for_bit(blocked, hub, pushed, place):
    image = Image.merge("RGB", [Image.effect_noise((20, 20), 60) for _ in range(3)])
    image.save(place / "image.png")
    wanted = expected(pushed, image)
    home = f"load-{blocked}"
    results = load(hub, place, home, blocked)
    # The Hub out of reach: from the cache that the process before has left.
    offline = load(hub, place, home, blocked, HF_HUB_OFFLINE="1")
    for found, sources in ((results, {"repository", "revision", "folder"}), (offline, {"repository", "revision"})):
        assert set(found) == sources
        for source, tensors in found.items():
            reference = wanted["first" if source == "revision" else "second"]
            assert set(tensors) == set(reference)
            for name, tensor in tensors.items():
                assert torch.equal(tensor, reference[name]), (source, name)
