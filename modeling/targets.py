"""What is predicted of the hidden tokens: the targets that a config can name."""

from .target_base import TARGETS
from .target_discrete import DiscreteTokenTarget
from .target_frequency import FrequencyTarget
from .target_hog import HOGTarget
from .target_morphing import TokenMorphingTarget
from .target_moving_average import MovingAverageTarget
from .target_pixel import PixelTarget
from .target_teacher import TeacherFeatureTarget
from .target_teachers import TeacherFeaturesTarget


TARGETS |= {
    "pixel": PixelTarget,
    "hog": HOGTarget,
    "frequency": FrequencyTarget,
    "teacher_feature": TeacherFeatureTarget,
    "teacher_features": TeacherFeaturesTarget,
    "moving_average": MovingAverageTarget,
    "discrete_token": DiscreteTokenTarget,
    "token_morphing": TokenMorphingTarget,
}
