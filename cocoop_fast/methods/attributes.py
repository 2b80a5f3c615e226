"""Which attributes ATPrompt's authors published for which data set.

Source: Li et al., Advancing Textual Prompt Learning with Anchored Attributes, ICCV 2025;
https://github.com/zhengli97/ATPrompt, ``choose_attribute_for_atprompt`` in train.py. Read, not searched for again.
"""

from __future__ import annotations

from cocoop_fast.errors import UserError

LAYOUT = "ATPrompt"  # what people call prompts with attributes
PUBLISHED = "published"  # in a configuration: those of the data set trained on
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "imagenet": ("color", "shape"),
    "caltech101": ("shape", "size"),
    "oxford_pets": ("playfulness", "energy"),
    "stanford_cars": ("luxury",),
    "oxford_flowers": ("color", "habitat", "growth"),
    "food101": ("flavor", "preparation"),
    "fgvc_aircraft": ("design", "range"),
    "sun397": ("function",),
    "dtd": ("pattern", "color", "design"),
    "eurosat": ("habitat",),
    "ucf101": ("precision",),
}
_VARIANTS = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")  # of the same classes


def attributes_for(attributes: tuple[str, ...], dataset: str) -> tuple[str, ...]:
    """Those asked for, or where that is "published" the data set's own.

    Raises:
        UserError: there are none for this data set, or others are listed beside them.
    """
    if PUBLISHED not in attributes:
        return attributes
    if len(attributes) > 1:
        raise UserError(
            f"Attributes are those {PUBLISHED} or a list of your own, not both: {', '.join(attributes)}."
        )
    known = "imagenet" if dataset in _VARIANTS else dataset
    if known not in ATTRIBUTES:
        raise UserError(
            f"No attributes are published for {dataset}, only for {', '.join(ATTRIBUTES)}; list words that describe its "
            "classes, as in --attributes color,shape."
        )
    return ATTRIBUTES[known]
