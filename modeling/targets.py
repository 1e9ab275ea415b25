"""What is predicted of the hidden tokens: the targets that a config can name."""

from .target_frequency import FrequencyTarget
from .target_hog import HOGTarget
from .target_pixel import PixelTarget


TARGETS = {"pixel": PixelTarget, "hog": HOGTarget, "frequency": FrequencyTarget}
