"""What the project relies on beyond the public interfaces of its libraries, so that an upgrade fails here first."""

import ast
import inspect
from pathlib import Path

import datasets
import fsspec
import pytest
import torch
import transformers
from transformers.integrations import TrackioCallback

from hf_mim.training.trainer.segmentation_trainer import SegmentationTrainer


ROOT = Path(__file__).parent.parent
C10D = torch.distributed.distributed_c10d

# library's object -> {private name: what relies on it, and how}
PRIVATE = {
    transformers.Trainer: {
        "_created_lr_scheduler": "trainer/trainer.py: lr_drops makes the scheduler, and says so",
        "_finish_current_push": "trainer/pushing.py: waits for the push that is under way",
        "_get_output_dir": "trainer/saving.py: checkpoints are written beside their place",
        "_get_train_sampler": "trainer/trainer.py: the order of the images follows from seed and epoch",
        "_initial_global_step": "trainer/saving.py: how many images of a stream this call of train has used",
        "_issue_warnings_after_load": "trainer/saving.py: learns that weights have older names",
        "_load_best_model": "trainer/saving.py, finetune_trainer.py: older names, averaged weights",
        "_load_from_checkpoint": "trainer/saving.py, finetune_trainer.py: moving targets, streams, averages",
        "_load_rng_state": "trainer/saving.py: restored after a stream's loader is open",
        "_prepare_inputs": "trainer/trainer.py: normalises on the device",
        "_push_from_checkpoint": "trainer/saving.py, pushing.py: pushes what loads, when it has its name",
        "_run_epoch": "trainer/trainer.py: no step after the last one",
        "_save": "trainer/saving.py: writes whole weights where checkpoints are sharded",
        "_save_checkpoint": "trainer/saving.py: renamed when complete",
    },
    transformers.PreTrainedModel: {
        "_can_compile_fullgraph": "modeling_mim.py: declared",
        "_can_record_outputs": "encoder_native.py: finds the module of the last attention",
        "_init_weights": "modeling_mim.py, evaluation/features.py: draws weights anew",
        "_keys_to_ignore_on_load_unexpected": "modeling_mim.py: parts that another head has",
        "_no_split_modules": "modeling_mim.py: FSDP wraps whole blocks",
        "_supports_attention_backend": "modeling_mim.py: declared",
        "_supports_flash_attn": "modeling_mim.py, encoder_native.py: declared, and asked of native models",
        "_supports_flex_attn": "modeling_mim.py, encoder_native.py",
        "_supports_sdpa": "modeling_mim.py, encoder_native.py",
        "_auto_class": "modeling_mim.py: saving writes the code beside the config",
    },
    transformers.PreTrainedConfig: {
        "_attn_implementation": "layers.py, encoder_native.py, trainer/throughput.py: reads and chooses the attention",
        "_attn_implementation_internal": "analysis/exact_attention.py: puts its own attention in, and back",
        "_auto_class": "configuration_mim.py",
        "_out_features": "configuration_base.py: a backbone's stages",
        "_out_indices": "configuration_base.py",
    },
    TrackioCallback: {"_trackio": "trainer/monitor.py: logs pictures"},
    datasets.Dataset: {
        "_fingerprint": "data/images.py, evaluation/feature_store.py: keys of what is kept of a data set",
        "_indices": "data/bad_images.py: names the row of a selection",
    },
    datasets.IterableDataset: {
        "_ex_iterable": "data/shards.py: opens one shard",
        "_resolve_features": "data/streaming.py: the columns of a stream that does not say them",
    },
    fsspec.AbstractFileSystem: {"_strip_protocol": "data/urls.py: the path inside a URL"},
    torch: {
        "_assert_async": "encoder_vit.py: checks a mask without waiting for the GPU",
        "_foreach_lerp_": "target_moving_average.py: one kernel for all weights",
    },
    torch.utils.data.DataLoader: {"_iterator": "trainer/stopping.py: holds the workers that are kept"},
    torch.utils.data.dataloader._MultiProcessingDataLoaderIter: {"_shutdown_workers": "trainer/stopping.py: ends them"},
    torch.UntypedStorage: {"_cdata": "trainer/memory.py: which storage a tensor is a view of"},
    torch.Tensor: {"_version": "teachers.py: notices pixels that were changed in place"},
    C10D: {"_get_default_store": "trainer/processes.py: which process was the first to meet an error"},
}
OTHERS = {"_exit"}  # of os: public in spite of its name
# Where attributes are set that only instances have.
WHERE_SET = {
    transformers.Trainer: (transformers.trainer,),
    TrackioCallback: (inspect.getmodule(TrackioCallback),),
    transformers.PreTrainedConfig: (transformers.configuration_utils, transformers.backbone_utils),
    datasets.Dataset: (datasets.arrow_dataset,),
    torch.utils.data.DataLoader: (torch.utils.data.dataloader,),
    datasets.IterableDataset: (datasets.iterable_dataset,),
}


@pytest.mark.parametrize(
    ("owner", "name"), [pytest.param(o, n, id=f"{o.__name__}.{n}") for o, names in PRIVATE.items() for n in names]
)
def test_the_libraries_have_what_is_relied_on(owner, name):
    sources = [inspect.getsource(module) for module in WHERE_SET.get(owner, ())]
    there = hasattr(owner, name) or any(f"self.{name}" in source for source in sources)
    assert there, f"{owner.__name__} has no {name} any more; {PRIVATE[owner][name]}"


def modules() -> list[Path]:
    links = {path.name for path in (ROOT / "hf_mim").iterdir() if path.is_symlink()}
    own = [path for path in (ROOT / "hf_mim").rglob("*.py") if path.relative_to(ROOT / "hf_mim").parts[0] not in links]
    return sorted([*(ROOT / "modeling").glob("*.py"), *(ROOT / "training").rglob("*.py"), *own])


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def used_and_own_names() -> tuple[dict[str, str], set[str]]:
    """-> the private names that are read, called, set or asked for by `getattr`, each with a place; those that are
    defined in the project, of which `self._name` is no foreign one."""
    used, own = {}, set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                on_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if on_self and isinstance(node.ctx, ast.Store):
                    own.add(node.attr)
                used.setdefault(node.attr, place)
                if ast.unparse(node.value) == "super()":
                    used[node.attr] = place
            elif isinstance(node, ast.ClassDef):
                names = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
                names += [t.id for item in node.body if isinstance(item, ast.Assign) for t in item.targets]
                names += [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
                own |= {name for name in names if is_private(name)}
            elif isinstance(node, ast.FunctionDef) and is_private(node.name):
                own.add(node.name)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
                name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
                if is_private(name):
                    used.setdefault(name, place)
    return used, own


def test_every_private_name_of_another_library_is_in_the_table():
    used, own = used_and_own_names()
    listed = {name for names in PRIVATE.values() for name in names} | OTHERS
    missing = {name: place for name, place in used.items() if name not in own | listed}
    assert not missing, f"add to PRIVATE what the project relies on: {missing}"
    unused = listed - used.keys() - own
    assert not unused, f"nothing relies on these any more: {unused}"


def test_every_private_method_of_trainer_that_is_overridden_is_in_the_table():
    ours = [kind for kind in SegmentationTrainer.__mro__ if kind.__module__.startswith("hf_mim")]
    assert {kind.__module__.rpartition(".")[0] for kind in ours} == {"hf_mim.training.trainer"}
    overridden = {
        name for kind in ours for name in vars(kind) if is_private(name) and name in vars(transformers.Trainer)
    }
    assert overridden <= PRIVATE[transformers.Trainer].keys()
    # Arguments that are passed by position: a new one must not come between.
    for name in overridden:
        theirs = list(inspect.signature(getattr(transformers.Trainer, name)).parameters)
        mine = inspect.signature(next(vars(kind)[name] for kind in ours if name in vars(kind))).parameters
        named = [p.name for p in mine.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert theirs[: len(named)] == named, f"{name} of Trainer takes {theirs} now, and ours {named}"
