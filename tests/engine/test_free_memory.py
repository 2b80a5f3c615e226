"""How much memory there is to be had: on the host, in a container, with other ranks beside."""

from __future__ import annotations

import pytest
import torch

from cocoop_fast.engine.memory import control_group_rooms, free_memory


def write_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(str(text))


@pytest.fixture
def groups(tmp_path):
    """Writes the kernel's list of the process's groups."""

    def write(text):
        path = tmp_path / "groups"
        path.write_text(text)
        return path

    return write


def test_version_2_with_the_limit_of_a_group_above(tmp_path, groups):
    root = tmp_path / "mount"
    stat = "anon 5\ninactive_file 300\n"
    write_group(root / "pod", memory_max=5000, memory_current=4000, memory_stat=stat)
    write_group(root / "pod/box", memory_max="max", memory_current=100, memory_stat=stat)
    assert control_group_rooms(groups("0::/pod/box\n"), root) == [1300]


def test_version_1(tmp_path, groups):
    root = tmp_path / "mount"
    for name, limit in (("", 9000), ("docker/abc", 2000)):
        write_group(
            root / "memory" / name,
            memory_limit_in_bytes=limit,
            memory_usage_in_bytes=1500,
            memory_stat="total_inactive_file 50\n",
        )
    assert sorted(control_group_rooms(groups("4:cpu:/x\n3:memory:/docker/abc\n"), root)) == [550, 7550]


def test_the_root_of_a_container_whose_path_is_the_host_s(tmp_path, groups):
    root = tmp_path / "mount"
    write_group(root, memory_max=700, memory_current=200, memory_stat="inactive_file 0\n")
    assert control_group_rooms(groups("0::/docker/not-mounted-here\n"), root) == [500]


@pytest.mark.parametrize("text", ["", "0::/\n", "not a list of groups\n"])
def test_no_limit(tmp_path, groups, text):
    assert control_group_rooms(groups(text), tmp_path / "mount") == []


def test_nothing_is_left_where_more_is_used_than_allowed(tmp_path, groups):
    write_group(tmp_path / "mount", memory_max=1, memory_current=2, memory_stat="")
    assert control_group_rooms(groups("0::/\n"), tmp_path / "mount") == [0]


def test_ranks_share_a_host(monkeypatch):
    alone = free_memory()
    assert alone is not None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory() < alone / 3


def test_a_gpu_s_is_the_driver_s_and_what_torch_holds_unused(monkeypatch):
    for name, found in (("mem_get_info", (700, 1000)), ("memory_reserved", 250), ("memory_allocated", 50)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert free_memory(torch.device("cuda")) == 900
