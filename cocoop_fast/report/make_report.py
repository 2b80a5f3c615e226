"""From directories to a page with its plots. Nothing is written before everything is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path

from cocoop_fast.errors import UserError
from cocoop_fast.files.atomic import write_atomically
from cocoop_fast.report.chapters import make_chapters
from cocoop_fast.report.inspection import Inspector
from cocoop_fast.report.page import render
from cocoop_fast.report.sources import read_sources
from cocoop_fast.report.style import Picture

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """A finished report.

    Args:
        page: HTML that needs no other file.
        pictures: its plots.
    """

    page: str
    pictures: tuple[Picture, ...]

    def write(self, folder: Path) -> Path:
        """Write the page and its plots. Returns the path of the page.

        Raises:
            UserError: the folder cannot be written.
        """
        files = {f"{one.name}.svg": one.svg.encode() for one in self.pictures}
        files |= {f"{one.name}.png": one.png for one in self.pictures}
        files[PAGE] = self.page.encode()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                write_atomically(folder / name, methodcaller("write", content))
        except OSError as error:
            raise UserError(
                f"The report cannot be written to {folder}: {error.strerror}.", exit_status=1
            ) from error
        return folder / PAGE


def make_report(
    paths: Sequence[Path],
    *,
    close_ups: int = 6,
    most_images: int = 2000,
    device: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Read runs, look at some of them closely, and make the page.

    Args:
        paths: run directories and output directories of protocols.
        close_ups: runs whose model is loaded and shown its test images; 0: only what is on disk is read.
        most_images: test images each of them is shown, of each set of classes.
        device: where models compute; ``None``: as their configuration says.
        tell: is told what is being done.

    Raises:
        UserError: no run there, damaged files, or matplotlib is missing.
    """
    chapters = make_chapters(read_sources(paths), Inspector(most_images, device), close_ups, tell)
    pictures = tuple(picture for chapter in chapters for picture in chapter.pictures)
    return Report(render(chapters, most_images), pictures)
