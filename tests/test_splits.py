"""Parts of a data set: drawn at random from the seed, in proportion to the classes, none of which gets lost."""

import numpy as np
import pytest
import torch

from hf_mim.training.common.errors import DataError
from hf_mim.training.data.labels import Labels
from hf_mim.training.data.report import describe_part
from hf_mim.training.data.splits import draw_labelled, draw_scenes, draw_subset, hold_out, hold_out_scenes, split_of


SIZES = {0: 500, 1: 300, 2: 40, 3: 3, 4: 1}
LABELS = np.random.default_rng(0).permutation(np.repeat(list(SIZES), list(SIZES.values())))


def counts(positions) -> list[int]:
    return np.bincount(LABELS[positions], minlength=len(SIZES)).tolist()


def test_a_subset_has_every_class_in_proportion():
    for count in (5, 10, 100, 600):
        drawn = draw_subset(LABELS, count)
        assert len(drawn) == count and (np.diff(drawn) > 0).all()
        for number, size in enumerate(SIZES.values()):
            # Within one image of its share of what is left once every class has its first.
            share = size * count / len(LABELS)
            assert counts(drawn)[number] >= 1 and abs(counts(drawn)[number] - share) <= max(2, 0.02 * count)
    assert draw_subset(LABELS, 10_000).tolist() == list(range(len(LABELS)))
    assert len(set(LABELS[draw_subset(LABELS, 3)])) == 3


def test_a_part_held_out_has_every_class_of_two_and_leaves_one_of_each():
    train, held = hold_out(LABELS, 0.1)
    assert sorted([*train, *held]) == list(range(len(LABELS)))
    assert counts(held) == [50, 30, 4, 1, 0] and min(counts(train)) >= 1
    assert counts(hold_out(LABELS, 0.999)[1]) == [499, 299, 39, 2, 0]
    assert len(hold_out(LABELS, 0.5, limit=100)[1]) == pytest.approx(100, abs=3)
    with pytest.raises(DataError, match="no class has two images"):
        hold_out(["a", "b", None])


@pytest.mark.parametrize(
    "part", [lambda seed: draw_subset(LABELS, 50, seed), lambda seed: hold_out(LABELS, 0.1, seed)[1]]
)
def test_a_part_follows_from_the_seed_and_is_random(part):
    assert part(3).tolist() == part(3).tolist() != part(4).tolist()
    # Over many seeds every image of a class is as likely as any other: 200 draws of a binomial variable.
    often = np.zeros(len(LABELS))
    for seed in range(200):
        often[part(seed)] += 1
    share = often[LABELS == 0].mean() / 200
    spread = np.sqrt(200 * share * (1 - share))
    assert abs(often[LABELS == 0] - 200 * share).max() < 5 * spread
    assert often[LABELS == 0].std() == pytest.approx(spread, rel=0.2)


def test_without_classes_and_with_names():
    assert len(draw_subset(30, 10)) == 10 and len(hold_out(30)[1]) == 3
    names = [None if i % 10 == 0 else f"class {i % 3}" for i in range(60)]
    assert {str(names[i]) for i in draw_subset(names, 8)} == {"None", "class 0", "class 1", "class 2"}


def test_the_split_of_a_name():
    names = ["train2017", "Training", "test-00000-of-00001", "val", "valid", "trainer", "unlabeled", "3"]
    assert [split_of(name) for name in names] == ["train", "train", "test", "val", "valid", None, None, None]


def test_parts_of_images_with_masks_keep_the_classes():
    rng = np.random.default_rng(0)
    for trial in range(50):
        presence = rng.random((40, 8)) < rng.uniform(0.02, 0.5, size=8)
        presence[:, 0] = True  # the background
        train, held = hold_out_scenes(presence, 0.2, seed=trial)
        assert sorted([*train, *held]) == list(range(40)) and 1 <= len(held) <= 8
        assert (presence[train].any(0) == presence.any(0)).all()
        drawn = draw_scenes(presence, 10, seed=trial)
        assert len(set(drawn.tolist())) == 10 and (presence[drawn].any(0) == presence.any(0)).all()
    assert (
        len(hold_out_scenes(np.eye(3, dtype=bool), 0.1)[1]) == 1
    )  # no image can be spared: one is held out all the same


def test_only_labelled_images_are_drawn():
    labels = np.array([-1, 0, 1, -1, 1, 0, 0, -1])
    assert draw_labelled(labels).tolist() == [1, 2, 4, 5, 6]
    drawn = draw_labelled(labels, 2)
    assert set(labels[drawn].tolist()) == {0, 1}


def test_every_class_keeps_an_image_to_train_on():
    labels = np.array([0] * 50 + [1] * 45 + [2] * 4 + [3])
    train, held = hold_out(labels)
    assert len(held) == 10 and sorted([*train, *held]) == list(range(100))
    assert set(labels[train]) == {0, 1, 2, 3} and 99 in train
    again = hold_out(labels)[1]
    assert held.tolist() == again.tolist()
    with pytest.raises(ValueError, match="none can be held out"):
        hold_out(np.arange(5))


def test_what_is_said_of_a_part_is_what_is_used():
    labels = Labels(torch.tensor([0] * 6 + [1] * 3), ["cat", "dog"])
    assert describe_part("test", 9, labels, "split test") == "test: 9 images (split test): cat 6, dog 3"
    assert describe_part("test", 9, labels, "split test", 3) == "test: 3 of 9 images (split test): cat 2, dog 1"
    assert describe_part("test", 9, labels, drawn=20) == "test: 9 images: cat 6, dog 3"
