"""The three protocols of the paper's section 4, and the few-shot one of CoOp's, as data."""

from __future__ import annotations

from dataclasses import dataclass

from cocoop_fast.config import Subset
from cocoop_fast.errors import UserError
from cocoop_fast.spelling import choice, meant

# In the order of the paper's tables.
IMAGENET = "imagenet"
TRANSFER_SETS = (
    "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397",
    "dtd", "eurosat", "ucf101",
)  # fmt: skip
IMAGENET_VARIANTS = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")


@dataclass(frozen=True)
class Protocol:
    """What is trained on, and what is tested on.

    Args:
        name: on the command line.
        title: over a table.
        source: the data set that is trained on; ``None``: each data set of its own.
        datasets: the paper's choice of data sets to test on.
        subset: which of its classes are trained on: the first half, "base", or "all".
        shots: training images a class, each a column of the table; empty: one number of them, the configuration's.
    """

    name: str
    title: str
    source: str | None
    datasets: tuple[str, ...]
    subset: Subset = "all"
    shots: tuple[int, ...] = ()


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="base2new",
            title="Trained on base classes, tested on base and new classes (Table 1)",
            source=None,
            datasets=(IMAGENET, *TRANSFER_SETS),
            subset="base",
        ),
        Protocol(
            name="cross-dataset",
            title="Trained on all classes of one data set, tested on others (Table 2)",
            source=IMAGENET,
            datasets=TRANSFER_SETS,
        ),
        Protocol(
            name="domain-generalization",
            title="Trained on all classes of one data set, tested on the same classes in other domains (Table 3)",
            source=IMAGENET,
            datasets=IMAGENET_VARIANTS,
        ),
        Protocol(
            name="few-shot",
            title="Trained on a few images of all classes, tested on the same classes (few-shot learning)",
            source=None,
            datasets=(IMAGENET, *TRANSFER_SETS),
            shots=(1, 2, 4, 8, 16),  # Zhou et al., Learning to Prompt for Vision-Language Models, section 4.1
        ),
    )
}


def in_shots(number: int) -> str:
    """A number of training images a class, in words."""
    return f"{number} shot{'' if number == 1 else 's'}" if number else "all images"


def find_protocol(name: str) -> Protocol:
    """The protocol of that name, in any spelling.

    Raises:
        UserError: there is none.
    """
    found = meant(name, PROTOCOLS)
    if found is None:
        choices = choice(name, PROTOCOLS, "The protocols are", "choose one of")
        raise UserError(f"There is no protocol {name!r}; {choices}.")
    return PROTOCOLS[found]
