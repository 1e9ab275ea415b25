"""What several processes must do as one does: run by torchrun in two, and in this process by test_processes.py."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from helpers import target_options, tiny_config
from rich.console import Console
from safetensors.torch import save_file
from test_pretrain import TINY
from test_trainer import dataset
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from hf_mim import MIMForPreTraining
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.commands.teacher import fit_codebook
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.pretraining import Splits
from hf_mim.training.trainer.arguments import MIMTrainingArguments
from hf_mim.training.trainer.monitor import TrainingMonitor
from hf_mim.training.trainer.trainer import MIMTrainer


BATCH, STEPS = 8, 6  # images of all processes together
AVERAGE = {"target": "moving_average", "target_config": {"decay": 0.5, "end_decay": 0.5}}
FINE = {"encoder_config": {"patch_size": 2}}  # 64 tokens: two equal masks are no accident
CODEBOOK = [
    *("model.image_size=32", "model.encoder_config={hidden_size: 16, num_attention_heads: 2, patch_size: 8}"),
    *("model.target_config.match=interpolate", "model.target_config.input_size=32", "model.target_config.layers=[-1]"),
]


class Noise(torch.utils.data.Dataset):
    """Images of a user's own: masks are drawn from torch's random state."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return {"pixel_values": torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index))}


def train(folder: Path, data, resume=False, watched=False, **changes) -> tuple[MIMTrainer, dict]:
    """A run of `STEPS` steps, and what was seen of it in this process."""
    torch.manual_seed(0)
    model, processes = MIMForPreTraining(tiny_config(**changes)), int(os.environ.get("WORLD_SIZE", 1))
    arguments = MIMTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH // processes, max_steps=STEPS, learning_rate=1e-2,
        bf16=False, logging_steps=1, save_strategy="steps", save_steps=3, save_total_limit=5,
    )  # fmt: skip
    collator = MIMCollator(model.config, model.mask_grid(16, 16))
    trainer = MIMTrainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
    if watched:
        plain = data.without_augmentation()
        plain.labels = torch.arange(len(data)) % 3
        trainer.add_callback(TrainingMonitor(trainer, Splits(data, plain, plain, ""), folder, 3, lambda text: None))
    seen = {"masks": [], "seeds": []}

    def note(module, args, inputs):
        if module.training:
            seen["masks"].append(inputs["bool_masked_pos"].clone())
            seen["seeds"].append(inputs["generator"].initial_seed())

    model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    seen["log"] = trainer.state.log_history
    return trainer, {**seen, "masks": torch.stack(seen["masks"])}


def as_one(folder: Path) -> dict:
    """Everything that must not depend on the number of processes: numbers of the first, tensors of each."""
    found, tensors = {}, {}
    trainer, seen = train(folder / "average", dataset(24), watched=True, **AVERAGE, **FINE)
    tensors |= {f"teacher.{name}": value.contiguous() for name, value in trainer.target.moving_state().items()}
    tensors["masks"], found["seeds"], found["log"] = seen["masks"], seen["seeds"], seen["log"]
    trainer, _ = train(folder / "average", dataset(24), resume=True, **AVERAGE, **FINE)
    tensors |= {f"resumed.{name}": value.contiguous() for name, value in trainer.target.moving_state().items()}
    codes = {"features": {"name": "hog", "cell_size": 4}, "codebook": str(folder.parent / "codes.safetensors")}
    options = {"target": "discrete_token", "target_config": codes}
    _, seen = train(folder / "codes", dataset(24), watched=True, **options)
    found["codes"] = [{k: v for k, v in entry.items() if "code" in k} for entry in seen["log"]]
    _, seen = train(folder / "noise", Noise(), **FINE)
    tensors["noise_masks"] = seen["masks"]
    teacher = target_options("teacher_feature", folder.parent)["teacher"]
    found["fit"] = fit_codebook(teacher, folder / "fitted.safetensors", CODEBOOK, 4, 16, Console(quiet=True))
    assert (folder / "fitted.safetensors").is_file()  # in every process, when the call is over
    return {"found": found, "tensors": tensors}


def sharded_steps(shard: bool) -> tuple[list[float], dict]:
    """-> the losses of a few steps with weights sharded by FSDP2 itself, and the whole weights after them."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if shard else (0, 1)
    torch.manual_seed(0)
    model = MIMForPreTraining(tiny_config()).train()
    if shard:
        mesh = dist.device_mesh.init_device_mesh("cpu", (processes,))
        for layer in [*model.mim.encoder.layers, *model.decoder.layers]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer, generator, losses = torch.optim.SGD(model.parameters(), lr=0.1), torch.Generator().manual_seed(1), []
    mine = torch.arange(4).chunk(processes)[rank]
    for _ in range(4):
        pixels = torch.randn(4, 3, 16, 16, generator=generator)
        masks = torch.rand(4, 16, generator=generator).argsort(1) < 12
        loss = model(pixel_values=pixels[mine], bool_masked_pos=masks[mine]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / processes
        if shard:
            dist.all_reduce(mean)
        losses.append(mean.item())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return losses, get_model_state_dict(model, options=options) if shard else model.state_dict()


def fsdp_run(folder: Path, *words) -> None:
    """`hf-mim pretrain` with a moving average."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    words = [*TINY, *words, "model.target=moving_average", "model.target_config={decay: 0.5, end_decay: 0.5}"]
    words += ["training.save_strategy=steps", "training.save_steps=4", "training.save_total_limit=5"]
    words += [f"training.per_device_train_batch_size={16 // processes}", f"training.output_dir={folder}"]
    pretrain("mae_small", words, Console(quiet=True))


def fsdp(folder: Path) -> None:
    """The same under accelerate's FSDP2, saved in shards, and gone on with after losing the last checkpoint.

    accelerate shards on GPUs alone: it is told that these processes have one each, and finds their device by itself.
    """
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "ViTLayer",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # as accelerate launch does
    }
    post_init = MIMTrainingArguments.__post_init__

    def with_gpus(self):
        post_init(self)
        assert self.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    MIMTrainingArguments.__post_init__ = with_gpus
    fsdp_run(folder)
    if dist.get_rank() == 0:
        shutil.copytree(folder, folder.with_name("broken"))
        shutil.rmtree(folder.with_name("broken") / "checkpoint-8")
    dist.barrier()
    fsdp_run(folder.with_name("broken"), "training.resume=true")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    results = as_one(folder / "2")
    save_file(results["tensors"], folder / f"tensors-{rank}.safetensors")
    losses, weights = sharded_steps(True)
    results["found"]["losses"] = losses
    (folder / f"found-{rank}.json").write_text(json.dumps(results["found"]))
    if rank == 0:
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / "whole.safetensors")
    fsdp(folder / "sharded")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
