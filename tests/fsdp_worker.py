"""A few steps with weights sharded by FSDP2 over the processes that torchrun started; see test_ddp.py."""

import json
import sys

import torch
import torch.distributed as dist
from helpers import tiny_config
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from hf_mim import MIMForPreTraining


def main(folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh("cpu", (processes,))
    torch.manual_seed(0)
    model = MIMForPreTraining(tiny_config()).train()
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
        dist.all_reduce(mean)
        losses.append(mean.item())
    # Gathered from the shards: what one process then loads.
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        with open(f"{folder}/losses.json", "w") as file:
            json.dump(losses, file)
        MIMForPreTraining(tiny_config()).save_pretrained(folder, state_dict=state)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
