"""What a data set holds, and what that suggests. `visattn init` and `visattn doctor` ask before anything is trained.

Nothing here imports torch.
"""

from visattn.survey.guess import LabelGuess, guess_group_by, guess_label_map, guess_labels
from visattn.survey.look import (
    Facts,
    Pair,
    Survey,
    find_parts,
    image_facts,
    look_at_image,
    look_at_mask,
    mask_facts,
    survey,
)

__all__ = [
    "Facts",
    "LabelGuess",
    "Pair",
    "Survey",
    "find_parts",
    "guess_group_by",
    "guess_label_map",
    "guess_labels",
    "image_facts",
    "look_at_image",
    "look_at_mask",
    "mask_facts",
    "survey",
]
