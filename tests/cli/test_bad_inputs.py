"""Bad inputs, each with the sentence and the exit status that it must get, through the command line.

Whatever is wrong: one line on stderr, nothing on stdout, no traceback, and not a byte changed on the disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_calls import FAILED, Bad, a_file, expect
from PIL import Image

from cocoop_fast import cli

CLASSES = ("one", "two", "three", "four")


def write_photos(root: Path, classes: tuple[str, ...] = CLASSES) -> None:
    """Four tiny images a class: two to train on and one each to validate and test."""
    for shade, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (50 * shade, 40 * i, 90)).save(root / name / f"{i}.jpg")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests damage copies of it."""
    folder = tmp_path_factory.mktemp("trained")
    write_photos(folder / "photos")
    call = f"train -q --root {folder / 'photos'} --epochs 1 --shots 1 -o {folder / 'run'}"
    assert cli.run(call.split()) == 0
    return folder / "run"


# -- what is on the disk before the call ------------------------------------------------------------------------


def photos(folder: Path) -> None:
    write_photos(folder / "photos")


def a_text_file_called_jpg(folder: Path) -> None:
    photos(folder)
    for path in (folder / "photos" / "one").iterdir():
        path.write_text("this is not a picture")


def a_truncated_jpeg(folder: Path) -> None:
    photos(folder)
    for path in (folder / "photos" / "one").iterdir():
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:-600])


def an_empty_class_folder(folder: Path) -> None:
    photos(folder)
    (folder / "photos" / "five").mkdir()


def one_class_folder(folder: Path) -> None:
    write_photos(folder / "photos", ("one",))


def three_class_folders(folder: Path) -> None:
    write_photos(folder / "photos", ("one", "two", "three"))


def a_long_class_name(folder: Path) -> None:
    write_photos(folder / "photos", ("one", "two", "three", " ".join(["a"] * 80)))


def a_nameless_class_folder(folder: Path) -> None:
    write_photos(folder / "photos", ("one", "two", "three", "_"))


def an_empty_root(folder: Path) -> None:
    (folder / "photos").mkdir()


def a_picture(folder: Path) -> None:
    Image.new("RGB", (32, 32)).save(folder / "picture.png")


TRAIN = "train -o out "
FOLDER = TRAIN + "--root photos --epochs 1 --shots 1 "

BAD = [
    # the call itself
    Bad("unknown command", "fit", "No such command 'fit'"),
    Bad("misspelt command", "trian", "No such command 'trian'. Did you mean 'train'? See"),
    Bad("unknown option", TRAIN + "--learning-rate 1", "No such option: --learning-rate"),
    Bad("option without a value", TRAIN + "--shots", "--shots"),
    Bad("unknown method", TRAIN + "--method prograd", "--method: `prompt.method` is 'prograd'"),
    Bad("unknown method to compare", TRAIN + "--compare prograd", "no method 'prograd'"),
    Bad("comparing and not comparing", TRAIN + "--compare coop --no-compare", "exclude each other"),
    Bad("unknown subset", TRAIN + "--subset old", "`data.subset` is 'old'"),
    Bad("unknown data set", TRAIN + "--dataset mnist", "no data set called 'mnist'; choose one of digits"),
    Bad("key without a value", TRAIN + "optim.lr", "`optim.lr` has no value"),
    Bad("unknown key", TRAIN + "optim.lrr 1", "`optim.lrr` is not a known field; did you mean optim.lr?"),
    Bad("pictures alone", TRAIN + "photos", "photos is here: images are given as --root photos,", disk=photos),
    Bad("pictures and more", TRAIN + "photos 1", "not a known field; docs/configuration.md lists them all. photos is here:", disk=photos),
    Bad("key without its section", TRAIN + "momentum 1", "did you mean optim.momentum?"),
    Bad("unknown key of the reference", TRAIN + "OPTIM.LRR 1", "did you mean OPTIM.LR?"),
    Bad("unsupported value of the reference", TRAIN + "OPTIM.NAME adam", "OPTIM.NAME is 'adam', but only 'sgd'"),
    # values out of range
    Bad("negative shots", TRAIN + "--shots -1", "`data.shots` is -1, but it must be greater than or equal to 0"),
    Bad("shots that are no number", TRAIN + "--shots many", "--shots is 'many', but it must be a whole number."),
    Bad("no epochs", TRAIN + "--epochs 0", "`optim.epochs` is 0, but cocoop has to learn"),
    Bad("learning rate that is no number", TRAIN + "optim.lr fast", "`optim.lr` is 'fast', but it must be a number"),
    Bad("number with a comma", TRAIN + "--lr 0,002", "--lr is '0,002', but it must be a number, with a point for its fraction."),
    Bad("learning rate that is not finite", TRAIN + "--lr nan", "`optim.lr` is nan"),
    Bad("learning rate of zero", TRAIN + "--lr 0", "greater than 0"),
    Bad("empty batches", TRAIN + "--batch-size 0", "`optim.batch_size` is 0"),
    Bad("negative workers", TRAIN + "--workers -2", "`data.workers` is -2"),
    Bad("negative seed", TRAIN + "--seed -1", "`seed` is -1"),
    Bad("impossible crop", [*TRAIN.split(), "augment.crop_scale", "[0.5, 2]"], "`augment.crop_scale.1` is 2"),
    Bad("no context", TRAIN + "--n-ctx 0", "`prompt.n_ctx` is 0"),
    Bad("context too long", TRAIN + "--n-ctx 75", "but the model reads 77; shorten the name or the context"),
    Bad("unknown precision", TRAIN + "--precision fp8", "`model.precision` is 'fp8'"),
    Bad("unknown backend", TRAIN + "--backend tpu", "`model.backend` is 'tpu'"),
    Bad("unknown device", TRAIN + "--device abacus", "The device 'abacus' is unknown"),
    # configuration files
    Bad("no such file", TRAIN + "-c none.yaml", "none.yaml cannot be read: No such file or directory"),
    Bad("a directory as file", TRAIN + "-c .", "cannot be read: Is a directory"),
    Bad("not YAML", TRAIN + "-c c.yaml", "not valid YAML (line 1)", disk=a_file("c.yaml", "optim: [1, {")),
    Bad("not text", TRAIN + "-c c.yaml", "is not UTF-8 text", disk=a_file("c.yaml", b"\xff\xfe\x00")),
    Bad("a list as YAML", TRAIN + "-c c.yaml", "`field: value` pairs", disk=a_file("c.yaml", "- 1\n- 2")),
    Bad("unknown field", TRAIN + "-c c.yaml", "c.yaml: `optim.speed` is not", disk=a_file("c.yaml", "optim: {speed: 1}")),
    Bad("wrong type", TRAIN + "-c c.yaml", "c.yaml: `data.shots` is 'x'", disk=a_file("c.yaml", "data: {shots: x}")),
    Bad("value for a section", TRAIN + "-c c.yaml", "c.yaml: `optim` is 3, but it must be fields", disk=a_file("c.yaml", "optim: 3")),
    Bad("misspelt field", TRAIN + "-c c.yaml", "did you mean optim.epochs?", disk=a_file("c.yaml", "optim: {epoch: 1}")),
    Bad("misspelt section", TRAIN + "-c c.yaml", "did you mean optim?", disk=a_file("c.yaml", "optimizer: {lr: 1}")),
    Bad("yes for a number", TRAIN + "-c c.yaml", "`seed` is True, but it must be a number", disk=a_file("c.yaml", "seed: on")),
    Bad("half an epoch", TRAIN + "-c c.yaml", "2.5, but it must be a whole number", disk=a_file("c.yaml", "optim: {epochs: 2.5}")),
    Bad(
        "unsupported optimiser in a file of the reference",
        TRAIN + "-c c.yaml",
        "c.yaml: OPTIM.NAME is 'adam', but only 'sgd' is offered",
        disk=a_file("c.yaml", "OPTIM:\n  NAME: 'adam'"),
    ),
    # images
    Bad("no root", TRAIN + "--dataset folder", "--root DIR"),
    Bad("missing root", FOLDER, "photos does not exist"),
    Bad("a file as root", FOLDER, "photos is a file", disk=a_file("photos", "")),
    Bad("empty root", FOLDER, "photos has no class folders", disk=an_empty_root),
    Bad("one class", FOLDER, "one class folder", disk=one_class_folder),
    Bad("no halves", FOLDER + "--subset base", "use data.subset all", disk=three_class_folders),
    Bad("empty class folder", FOLDER, "five has no images", FAILED, an_empty_class_folder),
    Bad("text file called jpg", FOLDER, "one/0.jpg (not an image)", FAILED, a_text_file_called_jpg),
    Bad("truncated jpeg", FOLDER, "(truncated)", FAILED, a_truncated_jpeg),
    Bad("a class without good images", FOLDER + "--skip-bad-images", "'one'", FAILED, a_truncated_jpeg),
    Bad("class name too long", FOLDER, "its name), but the model reads 77", disk=a_long_class_name),
    Bad("class name without letters", FOLDER, "has no name", disk=a_nameless_class_folder),
    # models
    Bad("unknown model", TRAIN + "--model ViT-B-17", "'ViT-B-17' is not an open_clip architecture"),
    Bad("a model without a name like it", TRAIN + "--model abacus", "open_clip.list_models() names those there are."),
    Bad("model without weights", TRAIN + "--model ViT-B-32", "needs weights"),
    Bad("unknown weights", TRAIN + "--model ViT-B-32 --pretrained mine", "no weights tagged 'mine'"),
    Bad("missing weights", TRAIN + "--model ViT-B-32 --pretrained w.pt", "w.pt does not exist"),
    Bad(
        "damaged weights",
        TRAIN + "--model ViT-B-32 --pretrained w.pt",
        "'w.pt' of model 'ViT-B-32' could not be loaded",
        FAILED,
        a_file("w.pt", b"PK\x03\x04 no weights at all"),
    ),
    Bad("weights for the embedded model", TRAIN + "--pretrained openai", "has its own weights"),
    # the run directory
    Bad("a file as run directory", TRAIN, "out cannot be used", FAILED, a_file("out", "")),
    Bad("a file above the run directory", "train -o out/run", "out/run cannot be used", FAILED, a_file("out", "")),
    # other commands
    Bad("evaluating nothing", "eval", "Give a run directory, or --reference-checkpoint"),
    Bad("evaluating no run", "eval .", "not a run directory"),
    Bad("evaluating a missing run", "eval nowhere", "not a run directory"),
    Bad("evaluating by an empty shortlist", "eval . --shortlist 0", "--shortlist is 0"),
    Bad("evaluating unknown classes", "eval . --subset old", "--subset is 'old'"),
    Bad("predicting nothing", "predict", "Missing argument 'IMAGE"),
    Bad("predicting a missing image", "predict none.jpg", "none.jpg cannot be read: missing", FAILED),
    Bad("predicting an address", "predict https://a.org/b.png", "https://a.org/b.png is an address; download the image"),
    Bad("one class in a file", "predict . --classes one", "one class, 'cat'; give two", disk=a_file("one", "cat\n")),
    Bad("exporting to a folder", "export out --onnx .", "--onnx . is a folder; name a file"),
    Bad("a misspelt protocol", "run basetonew", "'basetonew'; did you mean base2new? The protocols are base2new,"),
    Bad("no protocol at all", "run photos", "'photos'; choose one of base2new,"),
    Bad("cells in a file", "run Base2New -o f", "--output-dir f is a file; name a directory", disk=a_file("f", "")),
    Bad("a GPU without a name like it", "plan --device abacus", "`cocoop-fast plan --list-devices` names all."),
    Bad("predicting a directory", "predict .", "The folder . has no images", FAILED),
    Bad("predicting text", "predict x.jpg", "x.jpg cannot be read: not an image", FAILED, a_file("x.jpg", "text")),
    Bad("predicting by no run", "predict picture.png --run .", "not a run directory", disk=a_picture),
    Bad("no classes shown", "predict picture.png --top-k 0", "--top-k is 0", disk=a_picture),
    Bad("a class given twice", "predict picture.png --classes cat,dog,cat", "names 'cat' twice", disk=a_picture),
    Bad("an empty class name", "predict picture.png --classes cat,,dog", "empty class name", disk=a_picture),
    Bad(
        "a class name too long",
        ["predict", "picture.png", "--classes", "cat," + "word " * 80],
        "its name), but the model reads 77",
        disk=a_picture,
    ),
    Bad("a model's classes", "predict picture.png --model ViT-B-32", "give --classes", disk=a_picture),
    Bad("a template without a place", "predict picture.png --template photo", "must contain {} once", disk=a_picture),
    Bad("a run's own model", "predict picture.png --run . --model demo", "--model is for", disk=a_picture),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_input(
    bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad.disk(tmp_path)
    expect(bad, tmp_path, monkeypatch, capsys)


GPU_ONLY = [
    Bad("a missing GPU", TRAIN + "--device cuda", "The device 'cuda' is not there"),
    Bad("a backend of a missing GPU", TRAIN + "--backend cuda", "cuda"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("bad", GPU_ONLY, ids=lambda bad: bad.name)
def test_bad_input_without_a_gpu(
    bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expect(bad, tmp_path, monkeypatch, capsys)


def checkpoints_cut_short(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:1000])


def checkpoints_of_something_else(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        torch.save({"weights": torch.zeros(3)}, path)


def unfinished_with_cut_checkpoints(run: Path) -> None:
    (run / "results.json").unlink()
    checkpoints_cut_short(run)


def no_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def configuration_damaged(run: Path) -> None:
    (run / "config.yaml").write_text("optim: {lr: fast}")


def untouched(run: Path) -> None:
    pass


BAD_RUNS: list[tuple[Bad, Callable[[Path], None]]] = [
    (Bad("evaluation of cut checkpoints", "eval out", "is damaged", FAILED), checkpoints_cut_short),
    (
        Bad("evaluation of other files", "eval out", "is not a checkpoint of", FAILED),
        checkpoints_of_something_else,
    ),
    (Bad("evaluation without checkpoints", "eval out", "no checkpoint yet", FAILED), no_checkpoints),
    (
        Bad("prediction by a damaged configuration", "predict p.png --run out", "`optim.lr`"),
        configuration_damaged,
    ),
    (Bad("resumption of cut checkpoints", "RESUME", "is damaged", FAILED), unfinished_with_cut_checkpoints),
    (
        Bad("resumption by another recipe", "RESUME --lr 0.5", "optim.lr is 0.002 there and 0.5 here"),
        untouched,
    ),
    (
        Bad("a missing file of the reference", "eval out --reference-checkpoint none", "none"),
        untouched,
    ),
]


@pytest.mark.parametrize(("bad", "damage"), BAD_RUNS, ids=lambda value: getattr(value, "name", ""))
def test_bad_run(
    bad: Bad,
    damage: Callable[[Path], None],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(trained, tmp_path / "out")
    # The copy knows its new place, which a resumed run would write down.
    config = tmp_path / "out" / "config.yaml"
    config.write_text(config.read_text().replace(f"output_dir: {trained}", "output_dir: out"))
    damage(tmp_path / "out")
    if isinstance(bad.arguments, str) and bad.arguments.startswith("RESUME"):
        again = f"train -q --root {trained.parent / 'photos'} --epochs 1 --shots 1 -o out"
        bad = Bad(bad.name, bad.arguments.replace("RESUME", again), bad.says, bad.status)
    expect(bad, tmp_path, monkeypatch, capsys)
