"""The 15 data sets of the paper's tables, one small file each: where its files are and how its lists are read.

``record`` says what a set is and loads any of them; the other files fill in records. To add a set, write such a
file and name it here.
"""

from __future__ import annotations

from cocoop_fast.data.sets import (
    caltech101,
    dtd,
    eurosat,
    fgvc_aircraft,
    food101,
    imagenet,
    oxford_flowers,
    oxford_pets,
    stanford_cars,
    sun397,
    ucf101,
)
from cocoop_fast.data.sets.record import PublishedSet

# In the order of the paper's tables.
SETS: dict[str, PublishedSet] = {
    record.name: record
    for record in (
        imagenet.IMAGENET,
        caltech101.SET,
        oxford_pets.SET,
        stanford_cars.SET,
        oxford_flowers.SET,
        food101.SET,
        fgvc_aircraft.SET,
        sun397.SET,
        dtd.SET,
        eurosat.SET,
        ucf101.SET,
        imagenet.IMAGENET_V2,
        imagenet.IMAGENET_SKETCH,
        imagenet.IMAGENET_A,
        imagenet.IMAGENET_R,
    )
}

__all__ = ["SETS", "PublishedSet"]
