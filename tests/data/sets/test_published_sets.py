"""Each published set on a miniature of its own layout: class names, counts, splits and few-shot picks.

The expectations are written down; the picks were once compared with those of the reference's own code on the same
trees. The published algorithms stand below a second time, on the global generator that the reference draws from.
"""

from __future__ import annotations

import json
import os
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from miniature_sets import WNIDS, WRITERS, write_jpegs

from cocoop_fast import UserError
from cocoop_fast.config import DataConfig
from cocoop_fast.data import load_dataset
from cocoop_fast.data.few_shot import sample_shots, select_classes
from cocoop_fast.data.inventory import take_inventory
from cocoop_fast.data.sets import SETS, record


@dataclass(frozen=True)
class Expected:
    """What a miniature must give; ``test`` is the first test image, ``picks`` are two shots with seed 1."""

    classnames: list[str]
    counts: tuple[int, int, int]
    test: tuple[str, int]
    picks: str = ""


EXPECTED = {
    "imagenet": Expected(
        ["tench", "goldfish", "great white shark", "crane", "crane"],
        (30, 10, 10),
        ("val/n01440764/ILSVRC2012_val_7641.JPEG", 0),
        "train/n01440764/n01440764_2.JPEG train/n01440764/n01440764_7.JPEG "
        "train/n01443537/n01443537_10.JPEG train/n01443537/n01443537_30.JPEG "
        "train/n01484850/n01484850_10.JPEG train/n01484850/n01484850_41.JPEG "
        "train/n02012849/n02012849_41.JPEG train/n02012849/n02012849_9.JPEG "
        "train/n03126707/n03126707_9.JPEG train/n03126707/n03126707_41.JPEG",
    ),
    "caltech101": Expected(
        ["face", "leopard", "motorbike", "accordion", "airplane"],
        (26, 10, 15),  # 11 accordions: round(5.5) = 6, round(2.2) = 2, 3
        ("Faces/image_0005.jpg", 0),
        "Faces/image_0009.jpg Faces/image_0007.jpg Leopards/image_0003.jpg Leopards/image_0005.jpg "
        "Motorbikes/image_0010.jpg Motorbikes/image_0006.jpg accordion/image_0009.jpg accordion/image_0002.jpg "
        "airplanes/image_0010.jpg airplanes/image_0005.jpg",
    ),
    "oxford_pets": Expected(
        ["abyssinian", "american bulldog", "american curl", "yorkshire terrier"],
        (16, 4, 12),
        ("yorkshire_terrier_20.jpg", 3),
        "yorkshire_terrier_14.jpg yorkshire_terrier_10.jpg American_Curl_12.jpg American_Curl_11.jpg "
        "american_bulldog_13.jpg american_bulldog_14.jpg Abyssinian_13.jpg Abyssinian_12.jpg",
    ),
    "stanford_cars": Expected(
        [
            "2000 AM General Hummer SUV",
            "2012 Acura RL Sedan",
            "2012 Ram C/V Cargo Van Minivan",
            "2012 smart fortwo",
        ],
        (16, 4, 8),
        ("cars_test/00001.jpg", 0),
        "cars_train/00017.jpg cars_train/00001.jpg cars_train/00010.jpg cars_train/00006.jpg "
        "cars_train/00015.jpg cars_train/00019.jpg cars_train/00016.jpg cars_train/00012.jpg",
    ),
    "oxford_flowers": Expected(
        ["pink primrose", "hard-leaved pocket orchid", "colt's foot", "sword lily"],
        (20, 8, 12),
        ("image_00017.jpg", 1),
        "image_00033.jpg image_00025.jpg image_00010.jpg image_00018.jpg image_00039.jpg image_00023.jpg "
        "image_00008.jpg image_00020.jpg",
    ),
    "food101": Expected(
        ["apple pie", "baklava", "beef tartare", "bibimbap"],
        (20, 8, 12),
        ("apple_pie/4.jpg", 0),
        "apple_pie/8.jpg apple_pie/6.jpg baklava/2.jpg baklava/4.jpg beef_tartare/9.jpg beef_tartare/5.jpg "
        "bibimbap/1.jpg bibimbap/4.jpg",
    ),
    "fgvc_aircraft": Expected(
        ["707-320", "Model B200", "A300B4", "Yak-42"],  # in the order of variants.txt
        (12, 8, 8),
        ("3000.jpg", 0),
        "1000.jpg 1008.jpg 1005.jpg 1001.jpg 1006.jpg 1010.jpg 1007.jpg 1011.jpg",
    ),
    "sun397": Expected(
        ["abbey", "outdoor apartment building", "bedroom", "indoor cathedral"],
        (16, 4, 8),
        ("c/cathedral/indoor/sun_te0.jpg", 3),
        "c/cathedral/indoor/sun_tr4.jpg c/cathedral/indoor/sun_tr0.jpg b/bedroom/sun_tr2.jpg "
        "b/bedroom/sun_tr1.jpg a/apartment_building/outdoor/sun_tr3.jpg "
        "a/apartment_building/outdoor/sun_tr4.jpg a/abbey/sun_tr3.jpg a/abbey/sun_tr2.jpg",
    ),
    "dtd": Expected(
        ["banded", "blotchy", "cobwebbed", "crosshatched", "zigzagged"],
        (15, 5, 10),  # 6 images a class: 3, round(1.2) = 1, 2
        ("banded/banded_0004.jpg", 0),
        "banded/banded_0002.jpg banded/banded_0005.jpg blotchy/blotchy_0001.jpg blotchy/blotchy_0000.jpg "
        "cobwebbed/cobwebbed_0005.jpg cobwebbed/cobwebbed_0004.jpg crosshatched/crosshatched_0001.jpg "
        "crosshatched/crosshatched_0002.jpg zigzagged/zigzagged_0005.jpg zigzagged/zigzagged_0004.jpg",
    ),
    "eurosat": Expected(
        [
            "Annual Crop Land",
            "Forest",
            "Herbaceous Vegetation Land",
            "Highway or Road",
            "Industrial Buildings",
            "Pasture Land",
            "Permanent Crop Land",
            "Residential Buildings",
            "River",
            "Sea or Lake",
        ],
        (50, 20, 30),
        ("AnnualCrop/AnnualCrop_4.jpg", 0),
        "AnnualCrop/AnnualCrop_8.jpg AnnualCrop/AnnualCrop_6.jpg Forest/Forest_2.jpg Forest/Forest_4.jpg "
        "HerbaceousVegetation/HerbaceousVegetation_9.jpg HerbaceousVegetation/HerbaceousVegetation_5.jpg "
        "Highway/Highway_10.jpg Highway/Highway_4.jpg Industrial/Industrial_1.jpg Industrial/Industrial_2.jpg "
        "Pasture/Pasture_1.jpg Pasture/Pasture_3.jpg PermanentCrop/PermanentCrop_7.jpg "
        "PermanentCrop/PermanentCrop_4.jpg Residential/Residential_3.jpg Residential/Residential_6.jpg "
        "River/River_6.jpg River/River_7.jpg SeaLake/SeaLake_9.jpg SeaLake/SeaLake_10.jpg",
    ),
    "ucf101": Expected(
        ["Apply Eye Makeup", "Basketball Dunk", "Biking", "Yo Yo"],
        (16, 4, 8),
        ("Apply_Eye_Makeup/v_ApplyEyeMakeup_g01_c01.jpg", 0),
        "Apply_Eye_Makeup/v_ApplyEyeMakeup_g12_c01.jpg Apply_Eye_Makeup/v_ApplyEyeMakeup_g08_c01.jpg "
        "Basketball_Dunk/v_BasketballDunk_g10_c01.jpg Basketball_Dunk/v_BasketballDunk_g09_c01.jpg "
        "Biking/v_Biking_g11_c01.jpg Biking/v_Biking_g12_c01.jpg Yo_Yo/v_YoYo_g11_c01.jpg Yo_Yo/v_YoYo_g10_c01.jpg",
    ),
    "imagenetv2": Expected(
        ["tench", "goldfish", "great white shark", "crane", "crane"], (0, 0, 10), ("0/aaaa.jpeg", 0)
    ),
    "imagenet_sketch": Expected(
        ["tench", "goldfish", "great white shark", "crane", "crane"],
        (0, 0, 10),
        ("images/n01440764/sketch_0.JPEG", 0),
    ),
    "imagenet_a": Expected(["goldfish", "crane"], (0, 0, 4), ("imagenet-a/n01443537/0.0_a.jpg", 0)),
    "imagenet_r": Expected(
        ["tench", "great white shark", "crane"], (0, 0, 6), ("imagenet-r/n01440764/0.0_a.jpg", 0)
    ),
}

# The prompts of the reference's zero-shot CLIP, by its names of the data sets.
TEMPLATES = {
    "OxfordPets": "a photo of a {}, a type of pet.",
    "OxfordFlowers": "a photo of a {}, a type of flower.",
    "FGVCAircraft": "a photo of a {}, a type of aircraft.",
    "DescribableTextures": "{} texture.",
    "EuroSAT": "a centered satellite photo of {}.",
    "StanfordCars": "a photo of a {}.",
    "Food101": "a photo of {}, a type of food.",
    "SUN397": "a photo of a {}.",
    "Caltech101": "a photo of a {}.",
    "UCF101": "a photo of a person doing {}.",
    "ImageNet": "a photo of a {}.",
    "ImageNetSketch": "a photo of a {}.",
    "ImageNetV2": "a photo of a {}.",
    "ImageNetA": "a photo of a {}.",
    "ImageNetR": "a photo of a {}.",
}
TRAINABLE = [name for name, expected in EXPECTED.items() if expected.picks]
WITH_SPLIT_FILE = [name for name in TRAINABLE if SETS[name].split]


def load_whole(name, root):
    """As ``load_dataset``, if the miniature were what is published."""
    expected = EXPECTED[name]
    published = replace(SETS[name], classes=len(expected.classnames), counts=expected.counts)
    return record.load(published, DataConfig(name=name, root=root))


def test_all_fifteen_are_here():
    assert SETS.keys() == EXPECTED.keys() == WRITERS.keys() and len(SETS) == 15
    assert {one.reference_name: one.template for one in SETS.values()} == TEMPLATES


@pytest.mark.parametrize("name", SETS)
def test_the_documented_table_is_true(name):
    page = (Path(__file__).parents[3] / "docs" / "datasets.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` ")]
    published = SETS[name]
    parts = ", ".join(f"`{part.path}`" for part in published.parts)
    counts = " / ".join(f"{count:,}" if count else "-" for count in published.counts)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == [f"`{name}`", f"`{published.reference_name}`", f"`{published.folder}/`: {parts}"]
    assert not published.split or cells[3] == f"`{published.split.path}`"
    assert cells[4:] == [f"{published.classes:,}", counts, "torchvision" if published.download else "by hand"]


@pytest.mark.parametrize("name", EXPECTED)
def test_names_counts_and_labels(name, tmp_path):
    WRITERS[name](tmp_path)
    expected = EXPECTED[name]
    data = load_dataset(DataConfig(name=name, root=tmp_path))
    assert list(data.classnames) == expected.classnames
    assert (len(data.train), len(data.val), len(data.test)) == expected.counts
    assert (data.test[0].source, data.test[0].label) == expected.test
    assert data.test_only == (name not in TRAINABLE)
    assert data.template == TEMPLATES[SETS[name].reference_name]
    for sample in (*data.train, *data.val, *data.test):
        assert data.classnames[sample.label] == sample.classname
        assert data.read(sample).size == (24, 18)
    if name == "imagenet":
        assert data.val == data.test
    else:  # no image is in two splits
        sources = [sample.source for sample in (*data.train, *data.val, *data.test)]
        assert len(set(sources)) == sum(expected.counts)


@pytest.mark.parametrize("name", TRAINABLE)
def test_few_shot_picks(name, tmp_path):
    WRITERS[name](tmp_path)
    data = load_dataset(DataConfig(name=name, root=tmp_path))
    assert [sample.source for sample in sample_shots(data, 2, seed=1).train] == EXPECTED[name].picks.split()


@pytest.mark.parametrize("name", TRAINABLE)
def test_picks_and_halves_are_those_of_the_published_algorithm(name, tmp_path):
    WRITERS[name](tmp_path)
    data = load_dataset(DataConfig(name=name, root=tmp_path))
    full = [[(s.source, s.label) for s in split] for split in (data.train, data.val)]
    for shots, seed in ((1, 1), (2, 2), (3, 3), (16, 1)):
        random.seed(seed)
        train = published_few_shot(full[0], shots)
        val = full[1] if name == "imagenet" else published_few_shot(full[1], min(shots, 4))
        drawn = sample_shots(data, shots, seed)
        base, new = (select_classes(drawn, subset) for subset in ("base", "new"))
        middle = (len(data.classnames) + 1) // 2
        for ours, reference in ((("train"), train), (("val"), val)):
            found = [(s.source, s.label) for s in getattr(base, ours)]
            assert found == [(path, label) for path, label in reference if label < middle]
            found = [(s.source, s.label) for s in getattr(new, ours)]
            assert found == [(path, label - middle) for path, label in reference if label >= middle]


def published_few_shot(items, shots):
    """``generate_fewshot_dataset`` on pairs of path and label."""
    tracker = {}
    for path, label in items:
        tracker.setdefault(label, []).append((path, label))
    output = []
    for group in tracker.values():
        output.extend(random.sample(group, shots) if len(group) >= shots else group)
    return output


def published_50_20_30(by_class):
    """``read_and_split_data`` on the paths of each class, in order; returns labels and paths of three splits."""
    train, val, test = [], [], []
    for label, paths in by_class.items():
        paths = list(paths)
        random.shuffle(paths)
        n_train, n_val = round(len(paths) * 0.5), round(len(paths) * 0.2)
        train += [[path, label] for path in paths[:n_train]]
        val += [[path, label] for path in paths[n_train : n_train + n_val]]
        test += [[path, label] for path in paths[n_train + n_val :]]
    return train, val, test


def published_trainval(items):
    """``split_trainval`` on pairs of path and label."""
    tracker, train, val = {}, [], []
    for index, (_, label) in enumerate(items):
        tracker.setdefault(label, []).append(index)
    for indices in tracker.values():
        random.shuffle(indices)
        n_val = round(len(indices) * 0.2)
        val += [items[index] for index in indices[:n_val]]
        train += [items[index] for index in indices[n_val:]]
    return train, val


@pytest.mark.parametrize("name", WITH_SPLIT_FILE)
def test_a_missing_split_is_made_by_the_published_algorithm(name, tmp_path):
    WRITERS[name](tmp_path)
    data = load_whole(name, tmp_path)
    folder = tmp_path / SETS[name].folder
    path = folder / SETS[name].split.path
    written = json.loads(path.read_text())
    assert not list(folder.glob(".*.tmp"))
    pairs = {split: [[source, label] for source, label, _ in rows] for split, rows in written.items()}
    everything = sorted(pairs["train"] + pairs["val"] + pairs["test"])

    random.seed(1)
    if name in ("caltech101", "dtd", "eurosat", "food101", "oxford_flowers"):
        by_class: dict[int, list[str]] = {}
        for source, label in everything:  # files in sorted order, classes in order of first appearance
            by_class.setdefault(label, []).append(source)
        expected = published_50_20_30(by_class)
    else:
        in_order = sorted(pairs["train"] + pairs["val"], key=lambda pair: LISTED[name](*pair))
        expected = (*published_trainval(in_order), pairs["test"])
    assert (pairs["train"], pairs["val"], pairs["test"]) == expected

    stamp = path.stat().st_mtime_ns
    again = load_whole(name, tmp_path)
    assert (again.train, again.val, again.test) == (data.train, data.val, data.test)
    assert again.classnames == data.classnames and path.stat().st_mtime_ns == stamp


# How the official lists of the miniatures are ordered.
LISTED = {
    "oxford_pets": lambda path, label: (path.rpartition("_")[2], -label),
    "stanford_cars": lambda path, label: path,
    "sun397": lambda path, label: (-label, path),
    "ucf101": lambda path, label: (label, path),
}


@pytest.mark.parametrize("name", WITH_SPLIT_FILE)
def test_a_split_file_is_enough(name, tmp_path):
    """The annotations that it was made from need not be there, and class names are taken from it."""
    WRITERS[name](tmp_path)
    data = load_whole(name, tmp_path)
    folder = tmp_path / SETS[name].folder
    for part in SETS[name].raw:
        (folder / part.path).unlink()
    path = folder / SETS[name].split.path
    path.write_text(path.read_text().replace(f'"{raw_name(path)}"', '"renamed_class"'))
    again = load_whole(name, tmp_path)
    first = data.train[0].label
    assert again.classnames[first] == "renamed class"
    assert again.classnames[first + 1 :] == data.classnames[first + 1 :]
    assert [s.source for s in again.train] == [s.source for s in data.train]


def raw_name(split_file):
    return json.loads(split_file.read_text())["train"][0][2]


def test_class_names_in_a_split_file_are_those_that_the_reference_writes(tmp_path):
    for name, expected in (
        ("sun397", "indoor cathedral"),
        ("ucf101", "Apply_Eye_Makeup"),
        ("food101", "apple_pie"),
    ):
        WRITERS[name](tmp_path)
        load_whole(name, tmp_path)
        assert raw_name(tmp_path / SETS[name].folder / SETS[name].split.path) == expected


@pytest.mark.parametrize("name", SETS)
def test_the_references_class_name_means_the_same_set(name, tmp_path):
    WRITERS[name](tmp_path)
    theirs = load_dataset(DataConfig(name=SETS[name].reference_name, root=tmp_path))
    ours = load_dataset(DataConfig(name=name, root=tmp_path))
    assert theirs.name == name and theirs.test == ours.test and theirs.train == ours.train


def test_imagenet_does_not_depend_on_the_order_of_the_directory(tmp_path, monkeypatch):
    WRITERS["imagenet"](tmp_path)
    config = DataConfig(name="imagenet", root=tmp_path)
    expected = sample_shots(load_dataset(config), 2, seed=1)
    scandir = os.scandir

    class Backwards:
        def __init__(self, folder):
            with scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *reason):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert sample_shots(load_dataset(config), 2, seed=1).train == expected.train


def test_imagenet_needs_the_same_classes_in_train_and_val(tmp_path):
    WRITERS["imagenet"](tmp_path)
    write_jpegs(tmp_path / "imagenet/images/val/n09999999", ["a.JPEG"])
    with open(tmp_path / "imagenet/classnames.txt", "a") as file:
        file.write("n09999999 thing\n")
    with pytest.raises(UserError, match=r"n09999999 is in only one of train/ and val/"):
        load_dataset(DataConfig(name="imagenet", root=tmp_path))


def test_imagenetv2_labels_are_positions_among_the_sorted_ids(tmp_path):
    """Whatever the order of the lines: its folder 0 holds n01440764, the tench."""
    WRITERS["imagenetv2"](tmp_path)
    names = tmp_path / "imagenetv2/classnames.txt"
    names.write_text("".join(reversed(names.read_text().splitlines(keepends=True))))
    data = load_dataset(DataConfig(name="imagenetv2", root=tmp_path))
    assert list(data.classnames) == [name for _, name in sorted(WNIDS.items())]
    assert {sample.classname for sample in data.test if str(sample.source).startswith("0/")} == {"tench"}


@pytest.mark.parametrize("name", ["imagenet", "imagenetv2"])
def test_imagenets_names_of_other_lists_are_refused(name, tmp_path):
    """`n01440764 1 tench` would become the prompt "a photo of a 1 tench."."""
    WRITERS[name](tmp_path)
    names = tmp_path / name / "classnames.txt"
    lines = [line.split(maxsplit=1) for line in names.read_text().splitlines()]
    names.write_text("".join(f"{wnid} {i} {name}\n" for i, (wnid, name) in enumerate(lines, start=1)))
    with pytest.raises(UserError, match="numbers its classes: 'n01440764 1 tench' would become a prompt"):
        load_dataset(DataConfig(name=name, root=tmp_path))
    names.write_text("".join(f"{wnid} {name}\n" for wnid, name in [*lines, lines[0]]))
    with pytest.raises(UserError, match="names n01440764 twice"):
        load_dataset(DataConfig(name=name, root=tmp_path))


def test_a_directory_of_the_layout_may_be_a_link(tmp_path):
    """The reference's instructions suggest links to data that lie elsewhere."""
    WRITERS["oxford_pets"](tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/oxford_pets").symlink_to(tmp_path / "elsewhere/oxford_pets")
    for _ in range(2):  # without a split file, and with one
        data = load_dataset(DataConfig(name="oxford_pets", root=tmp_path / "data"))
        assert data.read(data.train[0]).size == (24, 18)


def test_directories_of_imagenet_may_be_links(tmp_path):
    WRITERS["imagenet"](tmp_path / "elsewhere")
    images = tmp_path / "data/imagenet/images"
    images.mkdir(parents=True)
    for split in ("train", "val"):
        (images / split).symlink_to(tmp_path / "elsewhere/imagenet/images" / split)
    (tmp_path / "elsewhere/imagenet/classnames.txt").rename(tmp_path / "data/imagenet/classnames.txt")
    data = load_dataset(DataConfig(name="imagenet", root=tmp_path / "data"))
    assert data.read(data.train[0]).size == (24, 18)


def test_a_split_that_cannot_be_kept_is_still_used(tmp_path, monkeypatch):
    WRITERS["dtd"](tmp_path)
    expected = load_whole("dtd", tmp_path)
    (tmp_path / "dtd/split_zhou_DescribableTextures.json").unlink()

    def read_only(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cocoop_fast.data.sets.record.write_split", read_only)
    with pytest.warns(UserWarning, match="split could not be written to .*Permission denied"):
        data = load_whole("dtd", tmp_path)
    assert data.train == expected.train


@pytest.mark.parametrize("name", WITH_SPLIT_FILE)
def test_a_set_that_is_not_whole_is_told_and_gets_no_split(name, tmp_path):
    WRITERS[name](tmp_path)
    expected = EXPECTED[name]
    data = load_dataset(DataConfig(name=name, root=tmp_path))
    (note,) = data.notes
    assert f"it has {len(expected.classnames)} classes and {sum(expected.counts)} images, and not" in note
    assert f"{SETS[name].classes:,} and {sum(SETS[name].counts):,}" in note and "not kept" in note
    assert not (tmp_path / SETS[name].folder / SETS[name].split.path).exists()
    assert load_whole(name, tmp_path).notes == ()
    (note,) = load_dataset(DataConfig(name=name, root=tmp_path)).notes  # now it has a split file
    assert "not kept" not in note


def test_only_images_are_listed(tmp_path):
    """What Windows leaves in a folder was taken into the split, and missed when it was deleted."""
    WRITERS["eurosat"](tmp_path / "clean")
    WRITERS["eurosat"](tmp_path / "used")
    for name in ("Thumbs.db", "desktop.ini", "Forest_1.jpg.part"):
        (tmp_path / "used/eurosat/2750/Forest" / name).write_text("no image")
    clean, used = (load_whole("eurosat", tmp_path / root) for root in ("clean", "used"))
    assert (used.train, used.val, used.test) == (clean.train, clean.val, clean.test)


def deeper(folder):
    """Put a folder into one of the same name, as many archives come out."""
    folder.rename(folder.with_name("moving"))
    folder.mkdir()
    folder.with_name("moving").rename(folder / folder.name)


def test_listed_images_one_level_too_deep(tmp_path):
    WRITERS["stanford_cars"](tmp_path)
    load_whole("stanford_cars", tmp_path)  # writes the split
    cars = tmp_path / "stanford_cars"
    deeper(cars / "cars_train")
    found = take_inventory(DataConfig(name="stanford_cars", root=tmp_path))
    where = f"{found.absent[0]} lies at {cars}/cars_train/{found.absent[0]} and should lie at {cars}/{found.absent[0]};"
    assert len(found.absent) == 20 and any(note.startswith(where) for note in found.notes)


def test_a_part_one_level_too_deep(tmp_path):
    WRITERS["dtd"](tmp_path)
    deeper(tmp_path / "dtd")
    where = f"images lies at {tmp_path}/dtd/dtd/images and should lie at {tmp_path}/dtd/images; move it."
    assert take_inventory(DataConfig(name="dtd", root=tmp_path)).notes == (where,)
    with pytest.raises(UserError, match=re.escape(where)):
        load_dataset(DataConfig(name="dtd", root=tmp_path))


def test_class_folders_one_level_too_deep(tmp_path):
    WRITERS["dtd"](tmp_path)
    deeper(tmp_path / "dtd/images")
    where = f"{tmp_path}/dtd/images has no images in class folders; they may lie one level too deep, in images/images/"
    with pytest.raises(UserError, match=re.escape(where)):
        load_dataset(DataConfig(name="dtd", root=tmp_path))


def test_a_folder_of_another_name_is_pointed_at(tmp_path):
    WRITERS["eurosat"](tmp_path)
    (tmp_path / "eurosat/2750").rename(tmp_path / "eurosat/EuroSAT_RGB")
    with pytest.raises(UserError, match=r"EuroSAT_RGB is there, .* if it is 2750, call it .*eurosat/2750"):
        load_dataset(DataConfig(name="eurosat", root=tmp_path))
    (tmp_path / "eurosat").rename(tmp_path / "EuroSAT")
    (note,) = take_inventory(DataConfig(name="eurosat", root=tmp_path)).notes
    assert note == f"{tmp_path}/EuroSAT is there; call it {tmp_path}/eurosat."
