"""The three protocols of the paper's section 4, as data."""

from __future__ import annotations

from dataclasses import dataclass

from cocoop_fast.errors import UserError

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
        source: the data set that is trained on, with all its classes; ``None``: each data set of its own, on
            the first half of its classes.
        datasets: the paper's choice of data sets to test on.
    """

    name: str
    title: str
    source: str | None
    datasets: tuple[str, ...]


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="base2new",
            title="Trained on base classes, tested on base and new classes (Table 1)",
            source=None,
            datasets=(IMAGENET, *TRANSFER_SETS),
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
    )
}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        UserError: there is none.
    """
    if name not in PROTOCOLS:
        raise UserError(f"There is no protocol {name!r}; choose one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]
