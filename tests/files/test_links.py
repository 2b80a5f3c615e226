"""Nothing is written, locked or truncated through a symbolic link."""

from __future__ import annotations

import pytest

from cocoop_fast.files.atomic import make_folder, through_no_link, write_atomically, write_json
from cocoop_fast.files.lock import locked


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious" and not path.is_symlink()


@pytest.mark.parametrize("name", ["file.json", ".file.json.tmp"])
def test_a_file_replaces_links_at_its_place_and_beside_it(tmp_path, victim, name):
    (tmp_path / name).symlink_to(victim)
    write_json(tmp_path / "file.json", {"a": 1})
    assert (tmp_path / "file.json").read_text() == '{\n  "a": 1\n}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "victim"]


def test_what_cannot_be_written_is_told_by_its_own_name(tmp_path):
    with pytest.raises(FileNotFoundError) as told:
        write_json(tmp_path / "nowhere" / "file.json", {}, many_writers=True)
    assert told.value.filename == str(tmp_path / "nowhere" / "file.json")


def test_a_link_to_nothing_is_not_followed_either(tmp_path):
    (tmp_path / ".file.tmp").symlink_to(tmp_path / "made through a link")
    write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("wait", [False, True])
def test_a_link_is_not_locked(tmp_path, victim, wait):
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(OSError, match=r"symbolic links: .*\.lock"), locked(tmp_path / ".lock", wait=wait):
        pass


@pytest.mark.parametrize("mode", ["a", "r+", "w"])
def test_opening(tmp_path, victim, mode):
    (tmp_path / "log").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"), open(tmp_path / "log", mode, opener=through_no_link):
        pass


def test_folders(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        make_folder(tmp_path / "link")
    with pytest.raises(FileNotFoundError):
        make_folder(tmp_path / "gone" / "folder")
    make_folder(tmp_path / "new")
    make_folder(tmp_path / "new")
