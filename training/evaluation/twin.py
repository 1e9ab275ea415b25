"""Whether an encoder can be told from the same one untrained."""

import math


SEED_SPREAD = 2.0  # percent: the standard deviation of untrained k-NN over seeds, of the recipe quick
BETTER, WORSE = 1.96, 3.0  # deviations of chance: 95 percent to say "better", a false alarm in a thousand for "worse"


def chance(trained: float, untrained: float, images: int) -> float:
    """The standard deviation, in percent, of the difference of two accuracies: by the images drawn, and by the twin's
    seed.

    Args:
        trained, untrained: percent of `images` test images.
    """
    drawn = sum(share * (1 - share) / images for share in (trained / 100, untrained / 100))
    return math.sqrt(1e4 * drawn + SEED_SPREAD**2)


def compare(trained: float, untrained: float, images: int) -> str:
    """`better`, `worse`, or `unclear` where chance explains the difference. Arguments as of `chance`."""
    difference, deviation = trained - untrained, chance(trained, untrained, images)
    if difference < -WORSE * deviation:
        return "worse"
    return "better" if difference > BETTER * deviation else "unclear"
