"""The mirror of published data sets, by a hub on this machine."""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile

import huggingface_hub
import pytest
from hub_stand_in import Hub, hub_at_work
from miniature_sets import WRITERS

from cocoop_fast import UserError, cli
from cocoop_fast.config import DataConfig
from cocoop_fast.data import load_dataset, mirror
from cocoop_fast.data.sets import SETS


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    with hub_at_work(hub) as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        hub.repositories[mirror.REPOSITORY] = {}
        yield hub


def archive_of(folder, name=None):
    """A zip of a set's folder, as the mirror has it, with what systems add."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as opened:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                opened.write(path, f"{name or folder.name}/{path.relative_to(folder)}")
        opened.writestr("__MACOSX/._x", b"x")
        opened.writestr("../outside", b"x")
    return content.getvalue()


def put(hub, made, name):
    WRITERS[name](made)
    archive = {"food101": "food101.zip"}.get(name, f"{SETS[name].folder}.zip")
    hub.repositories[mirror.REPOSITORY][archive] = archive_of(made / SETS[name].folder)
    return archive


@pytest.mark.parametrize("name", ["stanford_cars", "food101", "imagenet_a"])
def test_a_set_comes_in_its_layout(name, hub, tmp_path):
    put(hub, tmp_path / "made", name)
    told = []
    folder = mirror.download_from_mirror(SETS[name], tmp_path / "data", told.append)
    assert folder == tmp_path / "data" / SETS[name].folder and not (folder / ".mirror").exists()
    expected, data = (load_dataset(DataConfig(name=name, root=tmp_path / one)) for one in ("made", "data"))
    assert (data.train, data.val, data.test) == (expected.train, expected.val, expected.test)
    assert "terms are" in told[0] and "100 % of" in told[-1]
    assert not (tmp_path / "outside").exists() and not list(tmp_path.rglob("._x"))


def test_a_download_goes_on_where_it_stopped(hub, tmp_path):
    archive = put(hub, tmp_path / "made", "stanford_cars")
    whole = hub.repositories[mirror.REPOSITORY][archive]
    part = tmp_path / "data/stanford_cars/.mirror" / archive
    part.parent.mkdir(parents=True)
    part.write_bytes(whole[:100])
    told = []
    mirror.download_from_mirror(SETS["stanford_cars"], tmp_path / "data", told.append)
    assert hub.ranges == ["bytes=100-"]
    assert load_dataset(DataConfig(name="stanford_cars", root=tmp_path / "data")).train


def test_damage_is_noticed_and_the_next_attempt_begins_anew(hub, tmp_path):
    archive = put(hub, tmp_path / "made", "stanford_cars")
    whole = hub.repositories[mirror.REPOSITORY][archive]
    part = tmp_path / "data/stanford_cars/.mirror" / archive
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 100)  # of another file
    with pytest.raises(
        UserError, match=r"has the SHA-256 sum .* and not .*, so it was deleted\); the same command"
    ):
        mirror.download_from_mirror(SETS["stanford_cars"], tmp_path / "data", print)
    assert not part.exists() and hashlib.sha256(whole).hexdigest()
    mirror.download_from_mirror(SETS["stanford_cars"], tmp_path / "data", print)


def test_sums_that_are_known_here_count_as_well(hub, tmp_path, monkeypatch):
    put(hub, tmp_path / "made", "dtd")
    with pytest.raises(UserError, match=r"dtd.zip has the SHA-256 sum .* and not 5ba4d3000e60"):
        mirror.download_from_mirror(SETS["dtd"], tmp_path / "data", print)


def test_another_layout_is_told_of(hub, tmp_path):
    WRITERS["eurosat"](tmp_path / "made")
    files = hub.repositories[mirror.REPOSITORY]
    files["eurosat.zip"] = archive_of(tmp_path / "made/eurosat", "EuroSAT")
    with pytest.raises(UserError, match=r"eurosat.zip has no folder eurosat/, .*; or get 2750 from https://"):
        mirror.download_from_mirror(SETS["eurosat"], tmp_path / "data", print)
    shutil.rmtree(tmp_path / "made/eurosat/2750")
    (tmp_path / "made/eurosat/note.txt").write_text("nothing else")
    files["eurosat.zip"] = archive_of(tmp_path / "made/eurosat")
    with pytest.raises(UserError, match="is not all of it; get 2750 from https://"):
        mirror.download_from_mirror(SETS["eurosat"], tmp_path / "other", print)


def test_what_is_not_there(hub, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"The mirror does not have imagenet; get images"):
        mirror.download_from_mirror(SETS["imagenet"], tmp_path, print)
    with pytest.raises(UserError, match=r"sun397 could not be had from http://.*404"):
        mirror.download_from_mirror(SETS["sun397"], tmp_path, print)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"sun397 could not be had from http://127.0.0.1:9"):
        mirror.download_from_mirror(SETS["sun397"], tmp_path, print)


def test_on_the_command_line(hub, tmp_path, capsys):
    put(hub, tmp_path / "made", "stanford_cars")
    call = ["datasets", "download", "stanford_cars", "--root", str(tmp_path / "data")]
    assert cli.run(call) == 1
    assert "; or use --mirror." in capsys.readouterr().err
    assert cli.run([*call, "--mirror", "--json"]) == 0
    out, err = capsys.readouterr()
    assert '"missing": []' in out and "terms" in err and "terms" not in out


def test_fourteen_sets_have_an_archive():
    assert len([name for name in SETS if name not in mirror._NOT_THERE]) == 14
    assert set(mirror._TERMS) | set(mirror.KNOWN_SHA256) <= set(SETS)
