"""Targets that move or draw, under `MIMTrainer`: updated after each optimizer step, resumed, seeded by step."""

import torch
from helpers import tiny_config
from torch.utils.data import Dataset

from hf_mim import MIMForPreTraining
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.trainer.arguments import MIMTrainingArguments
from hf_mim.training.trainer.saving import MOVING_STATE
from hf_mim.training.trainer.trainer import MIMTrainer, seed_of


class Noise(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"pixel_values": torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index))}


def trainer(folder, **changes) -> MIMTrainer:
    torch.manual_seed(0)
    config = tiny_config(target="moving_average", target_config={"decay": 0.5, "end_decay": 0.5}, **changes)
    model = MIMForPreTraining(config)
    arguments = MIMTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=5,
        learning_rate=1e-2,
        bf16=False,
    )
    return MIMTrainer(
        model=model, args=arguments, train_dataset=Noise(), data_collator=MIMCollator(config, model.mask_grid(16, 16))
    )


def test_the_average_follows_each_step_and_is_resumed(tmp_path):
    whole = trainer(tmp_path / "whole")
    updates = []
    update = whole.target.update
    whole.target.update = lambda step: (updates.append(step), update(step))
    whole.train()
    assert updates == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "whole" / "checkpoint-3" / MOVING_STATE).is_file()
    resumed = trainer(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in whole.target.moving_state().items():
        assert torch.equal(resumed.target.moving_state()[name], value), name
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_several_masks_per_image_share_the_target(tmp_path):
    several = trainer(tmp_path, masks_per_image=3)
    batch = several.data_collator([Noise()[0], Noise()[1]])
    assert batch["bool_masked_pos"].shape == (2, 3, 16)
    assert not torch.equal(batch["bool_masked_pos"][:, 0], batch["bool_masked_pos"][:, 1])
    runs = []
    several.model.target.bind(several.model.mim.encoder)
    several.model.target.average.teacher.register_forward_hook(lambda module, args, out: runs.append(len(args[0])))
    assert several.model(**batch).logits.shape[0] == 6 and runs == [2]
    assert several.model.reconstruct(batch["pixel_values"], batch["bool_masked_pos"]).prediction.shape[0] == 2


def test_draws_differ_by_process_step_and_batch():
    seeds = {
        seed_of((seed, process, step, batch))
        for seed in (0, 1)
        for process in (0, 1)
        for step in (0, 1, 2)
        for batch in (0, 1)
    }
    assert len(seeds) == 24 and seed_of((0, 1, 2, 3)) == seed_of((0, 1, 2, 3))
