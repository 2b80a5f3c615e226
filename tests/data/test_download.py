"""Downloads, with torchvision's classes replaced by ones that make the same files, or by its own on archives from this machine."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tarfile
import threading
import urllib.error
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from miniature_sets import WRITERS
from torchvision import datasets
from torchvision.datasets import utils

from cocoop_fast import UserError
from cocoop_fast.config import DataConfig
from cocoop_fast.data import load_dataset
from cocoop_fast.data.dataset import Splits
from cocoop_fast.data.download import download
from cocoop_fast.data.sets import SETS
from cocoop_fast.data.split_file import write_split

DOWNLOADABLE = [name for name, record in SETS.items() if record.download]


def leave_as_torchvision_does(name: str, staging: Path, made: Path) -> None:
    """Put the parts of a finished set where the class of torchvision leaves them."""
    WRITERS[name](made)
    for source, target in SETS[name].download.moves:
        there = made / SETS[name].folder / target
        if not there.exists():  # what the archive holds besides
            there.mkdir(parents=True)
        (staging / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(there, staging / source)


@pytest.mark.parametrize("name", DOWNLOADABLE)
def test_what_comes_is_put_into_the_layout(name, tmp_path, monkeypatch):
    WRITERS[name](tmp_path / "expected")
    record = SETS[name]
    calls = []

    def arrive(root, download):
        calls.append((root, download))
        leave_as_torchvision_does(name, Path(root), tmp_path / "made")

    monkeypatch.setattr(datasets, record.download.classname, arrive)
    monkeypatch.setattr(utils, "download_url", lambda *arguments, **options: None)
    folder = download(record, tmp_path / "data")
    assert folder == tmp_path / "data" / record.folder
    assert calls == [(str(folder / ".download"), True)] and not (folder / ".download").exists()
    for part in record.raw:  # torchvision brings not all of what a split is made from
        if not (folder / part.path).exists():
            (folder / part.path).parent.mkdir(exist_ok=True)
            shutil.copy(tmp_path / "expected" / record.folder / part.path, folder / part.path)
    expected = load_dataset(DataConfig(name=name, root=tmp_path / "expected"))
    data = load_dataset(DataConfig(name=name, root=tmp_path / "data"))
    assert (data.train, data.val, data.test) == (expected.train, expected.val, expected.test)
    assert data.read(data.train[0]).size == (24, 18)

    download(record, tmp_path / "data")  # all there: nothing to do
    assert len(calls) == 1


def test_annotations_count_only_without_a_split(tmp_path, monkeypatch):
    WRITERS["oxford_pets"](tmp_path)
    folder = tmp_path / "oxford_pets"
    data = load_dataset(DataConfig(name="oxford_pets", root=tmp_path))
    write_split(folder / "split_zhou_OxfordPets.json", Splits(data.train, data.val, data.test))
    shutil.rmtree(folder / "annotations")
    calls = []

    def arrive(root, download):
        calls.append(root)
        leave_as_torchvision_does("oxford_pets", Path(root), tmp_path / "made")

    monkeypatch.setattr(datasets, "OxfordIIITPet", arrive)
    download(SETS["oxford_pets"], tmp_path)
    assert not calls and not (folder / "annotations").exists()
    (folder / "split_zhou_OxfordPets.json").unlink()
    download(SETS["oxford_pets"], tmp_path)
    assert len(calls) == 1 and (folder / "annotations/test.txt").exists()


def archive(folder: Path, arcname: str, path: Path) -> str:
    """A tar.gz of a folder; returns its MD5 sum."""
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname)
    return hashlib.md5(path.read_bytes()).hexdigest()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    """The address of ``tmp_path``."""
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(tmp_path))
    ) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture
def local_dtd(tmp_path, monkeypatch, server):
    """torchvision's own class of textures, on a local archive of the miniature."""
    WRITERS["dtd"](tmp_path / "made")
    for more in ("imdb", "labels"):
        (tmp_path / "made/dtd" / more).mkdir()
    # The class reads a list of its own once it has the files.
    (tmp_path / "made/dtd/labels/train1.txt").write_text("banded/banded_0000.jpg\n")
    md5 = archive(tmp_path / "made/dtd", "dtd", tmp_path / "dtd.tar.gz")
    monkeypatch.setattr(datasets.DTD, "_URL", f"{server}/dtd.tar.gz")
    monkeypatch.setattr(datasets.DTD, "_MD5", md5)


def test_torchvision_itself_on_a_local_archive(local_dtd, tmp_path):
    download(SETS["dtd"], tmp_path / "data")
    data = load_dataset(DataConfig(name="dtd", root=tmp_path / "data"))
    assert (len(data.train), len(data.val), len(data.test)) == (15, 5, 10)
    assert not (tmp_path / "data/dtd/.download").exists()


def test_a_wrong_checksum_is_told(local_dtd, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.DTD, "_MD5", "0" * 32)
    with pytest.raises(
        UserError, match=r"could not be downloaded \(File not found or corrupted.*get images from https"
    ):
        download(SETS["dtd"], tmp_path / "data")
    assert not (tmp_path / "data/dtd/images").exists()


def test_archives_that_torchvision_would_not_check(tmp_path, monkeypatch, server):
    WRITERS["fgvc_aircraft"](tmp_path / "made")
    shutil.copy(
        tmp_path / "made/fgvc_aircraft/images_variant_train.txt",
        tmp_path / "made/fgvc_aircraft/images_variant_trainval.txt",
    )
    path = tmp_path / "fgvc-aircraft-2013b.tar.gz"
    md5 = archive(tmp_path / "made/fgvc_aircraft", "fgvc-aircraft-2013b/data", path)
    address = f"{server}/{path.name}"
    monkeypatch.setattr(datasets.FGVCAircraft, "_URL", address)
    record = SETS["fgvc_aircraft"]

    def with_sum(md5):
        return replace(record, download=replace(record.download, archives=((address, md5),)))

    with pytest.raises(UserError, match="File not found or corrupted"):
        download(with_sum("0" * 32), tmp_path / "data")
    download(with_sum(md5), tmp_path / "data")
    assert len(load_dataset(DataConfig(name="fgvc_aircraft", root=tmp_path / "data")).train) == 12


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), ConnectionResetError("reset"), TimeoutError("too slow")]
)
def test_an_address_that_does_not_answer(tmp_path, monkeypatch, error):
    def fail(root, download):
        raise error

    monkeypatch.setattr(datasets, "SUN397", fail)
    with pytest.raises(
        UserError, match=r"could not be downloaded \(.*try again, or get SUN397 from"
    ) as caught:
        download(SETS["sun397"], tmp_path)
    assert caught.value.exit_status == 1


def test_what_came_lacks_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "EuroSAT", lambda root, download: None)
    with pytest.raises(UserError, match="has no eurosat/2750; get 2750 from"):
        download(SETS["eurosat"], tmp_path)


@pytest.mark.parametrize("name", [name for name in SETS if name not in DOWNLOADABLE])
def test_what_is_to_be_got_by_hand(name, tmp_path):
    record = SETS[name]
    with pytest.raises(UserError, match="cannot be downloaded by a program") as caught:
        download(record, tmp_path)
    for part in record.parts:
        assert f"get {part.path} from {part.source}" in str(caught.value)
        assert str(tmp_path / record.folder / part.path) in str(caught.value)
    assert not list(tmp_path.iterdir())
