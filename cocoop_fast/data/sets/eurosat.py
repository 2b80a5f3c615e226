"""EuroSAT (Helber et al., 2019): satellite images, RGB."""

from __future__ import annotations

from pathlib import Path

from cocoop_fast.data.dataset import Splits
from cocoop_fast.data.sets.class_folders import split_class_folders
from cocoop_fast.data.sets.record import Part, PublishedSet, TorchvisionDownload

RENAMED = {
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}  # Forest and River are called what they are


def read(folder: Path) -> Splits:
    """Folders are classes, most of them renamed."""
    return split_class_folders(folder / "2750", renamed=RENAMED)


SET = PublishedSet(
    name="eurosat",
    reference_name="EuroSAT",
    title="satellite images, 10 classes",
    folder="eurosat",
    images="2750",
    classes=10,
    counts=(13_500, 5_400, 8_100),
    parts=(Part("2750", "https://madm.dfki.de/files/sentinel/EuroSAT.zip (2750/)"),),
    split=Part(
        "split_zhou_EuroSAT.json", "https://drive.google.com/file/d/1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o/view"
    ),
    read=read,
    template="a centered satellite photo of {}.",
    download=TorchvisionDownload("EuroSAT", moves=(("eurosat/2750", "2750"),)),
)
