"""Where attention goes, block by block (Beyond [cls], 2412.03215, section 3; definitions of its released code)."""

import math

import torch
from torch import Tensor

from hf_mim.analysis.exact_attention import attention_modules
from hf_mim.analysis.measurement import Averages, Measurement, nested
from hf_mim.analysis.numbers import percent, readable


EPS = 1e-6
CACHED = 2**18  # numbers, 1 MiB
# name -> title, label of the y axis, unit
CLS_CURVES = {
    "cls_cls": ("[cls] to itself", "mass of attention", "share"),
    "cls_cls_adj": ("[cls] to itself over [cls] to patches", "ratio of masses", ""),
    "cls_patch": ("[cls] to one patch, mean", "mass of attention", "share"),
    "patch_cls": ("a patch to [cls], mean", "mass of attention", "share"),
    "cls_entropy": ("entropy of [cls] over patches", "entropy", "nats"),
    "cls_magnitude": ("what attention adds to [cls], over its norm", "ratio of norms", ""),
}
PATCH_CURVES = {
    "patch_self": ("a patch to itself, mean", "mass of attention", "share"),
    "patch_self_adj": ("a patch to itself, of its mass on patches", "share of the mass on patches", "share"),
    "patch_entropy": ("entropy of a patch over patches", "entropy", "nats"),
    "patch_magnitude": ("what attention adds to a patch, over its norm", "ratio of norms", ""),
}
REGISTER_CURVES = {
    "cls_register": ("[cls] to registers", "mass of attention", "share"),
    "patch_register": ("a patch to registers, mean", "mass of attention", "share"),
}


def row_statistics(weights: Tensor, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """What rows of attention give to the patches.

    Args:
        weights: (..., prefix + patches), rows of an attention matrix.

    Returns:
        the mass R on patches + 1e-6; the entropy in nats over patches, of A / R; and A itself on patches.
    """
    patches = weights[..., prefix:]
    mass = patches.sum(dim=-1) + EPS
    share = patches / mass[..., None]
    return mass, -torch.linalg.vecdot(share, (share + EPS).log_()), patches


class AttentionFlow(Measurement):
    """The statistics of Beyond [cls] per block, means over images and heads, and maps of where [cls] looks.

    With A the attention matrix of a head, rows summing to 1, index 0 [cls], i and j patches, R = sum over patches of a
    row + 1e-6: cls_cls = A_00; cls_cls_adj = A_00 / R_0, the odds of looking at itself, which may exceed 1;
    cls_patch = mean_j A_0j; patch_self = mean_i A_ii; patch_self_adj = mean_i A_ii / R_i; patch_cls = mean_i A_i0;
    entropies - sum_j a ln(a + 1e-6) of a = A_ij / R_i, in nats, at most ln(patches); magnitude = norm of what the
    attention branch adds over the norm of the token that enters + 1e-6, before any layer scale.

    Register and distillation tokens count as neither [cls] nor patches: their rows are left out, and the mass on them
    is `cls_register` and `patch_register`. Without [cls] the statistics of patches remain.
    """

    title = "Attention flow"
    watches_attention = True
    normal = (
        "The paper finds that in late blocks of masked autoencoders [cls] looks mostly at itself and spreads the rest "
        "almost evenly (entropy near its maximum), so that a pooler over patches beats it, while encoders trained by "
        "joint embedding look at few patches; small encoders can differ. A sign of trouble is attention as uniform in "
        "every block as the untrained encoder's, or patches that look at nothing but themselves."
    )

    def __init__(self, model, setting):
        super().__init__(model, setting)
        encoder = model.encoder
        self.prefix, self.has_cls = encoder.num_prefix_tokens, encoder.has_cls_token
        self.registers = self.prefix - int(self.has_cls)
        self.averages, self.maps, self.seen = Averages(), {"mean": [], "sharp": []}, 0
        try:
            self.blocks = len(attention_modules(model))
        except ValueError as error:
            self.absent = str(error)

    def attention(self, block: int, weights: Tensor) -> None:
        # A few images at a time: their matrices stay in the processor's cache through all the passes over them.
        at_once = len(weights) if weights.is_cuda else max(1, CACHED // weights[0].numel())
        parts = [self._statistics(part) for part in weights.split(at_once)]
        for name in parts[0]:
            self.averages.add(name, block, torch.cat([part[name] for part in parts]))
        num_examples = max(0, min(len(weights), self.setting.examples - self.seen))
        if self.has_cls and num_examples:
            self._keep_maps(block, weights[:num_examples, :, 0, self.prefix :])

    def _statistics(self, weights: Tensor) -> dict[str, Tensor]:
        """weights (images, heads, length, length) -> (images,) each, means over heads."""
        first, statistics = self.prefix, {}
        mass, entropy, to_patches = row_statistics(weights, first)
        own = to_patches[:, :, first:].diagonal(dim1=2, dim2=3)
        statistics["patch_self"] = own.mean(dim=(1, 2))
        statistics["patch_self_adj"] = (own / mass[:, :, first:]).mean(dim=(1, 2))
        statistics["patch_entropy"] = entropy[:, :, first:].mean(dim=(1, 2))
        if self.has_cls:
            to_itself = weights[:, :, 0, 0]
            statistics["cls_cls"], statistics["cls_cls_adj"] = (
                to_itself.mean(dim=1),
                (to_itself / mass[:, :, 0]).mean(dim=1),
            )
            statistics["cls_patch"], statistics["cls_entropy"] = (
                to_patches[:, :, 0].mean(dim=(1, 2)),
                entropy[:, :, 0].mean(dim=1),
            )
            statistics["patch_cls"] = weights[:, :, first:, 0].mean(dim=(1, 2))
        if self.registers:
            to_registers = weights[..., int(self.has_cls) : first].sum(dim=-1)
            statistics["patch_register"] = to_registers[:, :, first:].mean(dim=(1, 2))
            if self.has_cls:
                statistics["cls_register"] = to_registers[:, :, 0].mean(dim=1)
        return statistics

    def _keep_maps(self, block: int, looks: Tensor) -> None:
        """looks (images, heads, patches), what [cls] gives to them."""
        _, entropy, _ = row_statistics(looks, 0)
        sharpest = entropy.argmin(dim=1)
        share = looks / looks.sum(dim=2, keepdim=True).clamp(min=EPS)
        images = range(len(looks))
        for kind, maps in (("mean", share.mean(dim=1)), ("sharp", share[list(images), sharpest])):
            for i in images:
                number = self.seen + i
                if number == len(self.maps[kind]):
                    self.maps[kind].append([None] * self.blocks)
                self.maps[kind][number][block] = nested(maps[i].view(self.setting.grid))

    def branch(self, block: int, entering: Tensor, added: Tensor) -> None:
        ratio = added.norm(dim=2) / (entering.norm(dim=2) + EPS)
        self.averages.add("patch_magnitude", block, ratio[:, self.prefix :].mean(dim=1))
        if self.has_cls:
            self.averages.add("cls_magnitude", block, ratio[:, 0])

    def update(self, seen) -> None:
        self.seen += len(seen.pixel_values)

    def result(self) -> dict:
        curves = {}
        for name, (title, label, unit) in {**CLS_CURVES, **PATCH_CURVES, **REGISTER_CURVES}.items():
            if name in self.averages.sums:
                numbers = [block + 1 for block in sorted(self.averages.sums[name])]
                curves[name] = self.averages.curve(name, title, label, unit, x=numbers)
        patches = math.prod(self.setting.grid)
        maximum = {"title": "largest possible entropy, ln(patches)", "value": math.log(patches), "unit": "nats"}
        titles = {
            "mean": "where [cls] looks, mean of the heads",
            "sharp": "where [cls] looks, head of lowest entropy",
        }
        return {
            "title": self.title,
            "summary": self._summary(patches),
            "normal": self.normal,
            "images": self.seen,
            "curves": curves,
            "scalars": {"max_entropy": {**maximum, "low": None, "high": None, "normal": ""}},
            "maps": {kind: {"title": titles[kind], "images": maps} for kind, maps in self.maps.items() if maps},
        }

    def _summary(self, patches: int) -> str:
        last, maximum = self.blocks - 1, math.log(patches)

        def share(name: str) -> str:
            return percent(self.averages.mean(name, last))

        words = f"In the last block a patch gives {share('patch_self')} of its attention to itself"
        if not self.has_cls:
            return f"{words}; there is no [cls] token, so only the statistics of patches are given."
        entropy = self.averages.mean("cls_entropy", last)
        return (
            f"In the last block [cls] gives {share('cls_cls')} of its attention to itself and spreads the rest with an "
            f"entropy of {readable(entropy)} of at most {readable(maximum)} nats; a patch gives {share('patch_self')} "
            "to itself."
        )
