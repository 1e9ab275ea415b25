"""`SegmentationTrainer`: fine-tuning whose evaluation counts pixels."""

from collections.abc import Sized
from typing import cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from hf_mim.training.evaluation.iou import pixel_counts, predict_mask
from hf_mim.training.trainer.finetune_trainer import FinetuneTrainer


class SegmentationTrainer(FinetuneTrainer):
    """A `FinetuneTrainer` that evaluates masks at their own sizes. It keeps three numbers per image and class, not the
    predictions, which for a data set do not fit into memory."""

    def get_train_dataloader(self) -> DataLoader:
        # A last batch of one image would stop UperNet's batch norms. For training only: the argument is of both.
        args, whole = self.args, self.args.train_batch_size * self.args.world_size
        before, args.dataloader_drop_last = args.dataloader_drop_last, len(cast(Sized, self.train_dataset)) >= whole
        try:
            return super().get_train_dataloader()
        finally:
            args.dataloader_drop_last = before

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(inputs["pixel_values"]).logits
        counts = []
        for class_scores, labels, size in zip(logits, inputs["labels"], inputs["sizes"].tolist()):
            predicted, mask = predict_mask(class_scores, size).cpu(), labels[: size[0], : size[1]].cpu()
            counts.append(pixel_counts(predicted.numpy(), mask.numpy(), logits.shape[1]))
        counts = torch.from_numpy(np.stack(counts)).to(logits.device)
        return None, counts, torch.zeros(len(counts), device=logits.device)
