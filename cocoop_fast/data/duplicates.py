"""The same image twice: found by what files hold, whatever they are called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cocoop_fast.data import content
from cocoop_fast.data.dataset import Sample, Splits
from cocoop_fast.errors import UserError

_SHOWN = 3


def look_for_duplicates(splits: Splits, root: Path, where: str) -> tuple[str, ...]:
    """Warnings about images that are trained and tested on, or are there more than once.

    Args:
        splits: one's own images.
        root: what their sources are relative to. Files that are not there are not looked at.
        where: for messages.

    Raises:
        UserError: an image has two classes.
    """
    found: dict[str, list[tuple[str, Sample]]] = defaultdict(list)  # by source
    for split, samples in zip(Splits._fields, splits, strict=True):
        for sample in samples:
            found[str(sample.source)].append((split, sample))
    groups = _same_content(root, found)
    together = {source: group for group in groups for source in group}
    alone = [[source] for source in found if source not in together and len(found[source]) > 1]
    torn, leaked, repeated = [], [], []
    for group in (*groups, *alone):
        uses = [use for source in group for use in found[source]]
        if len({sample.label for _, sample in uses}) > 1:
            torn.append(_name(uses, lambda split, sample: f"{sample.source} in {sample.classname!r}"))
        elif len({split for split, _ in uses} & {"train", "test"}) == 2:
            leaked.append(_name(uses, lambda split, sample: f"{sample.source} in {split}"))
        else:
            repeated.append(_name(uses, lambda split, sample: str(sample.source)))
    if torn:
        raise UserError(
            f"{_count(torn)} in {where} under two classes: {_list(torn)}; leave each in the one it belongs to.",
            exit_status=1,
        )
    notes = []
    if leaked:
        notes.append(f"{_count(leaked)} in {where} both for training and for testing: {_list(leaked)}.")
    if repeated:
        notes.append(f"{_count(repeated)} in {where} more than once: {_list(repeated)}.")
    return tuple(notes)


def _name(uses: list[tuple[str, Sample]], text: Callable[[str, Sample], str]) -> str:
    return " = ".join(dict.fromkeys(text(*use) for use in uses))


def _count(images: list[str]) -> str:
    return "1 image is" if len(images) == 1 else f"{len(images)} images are"


def _list(images: list[str]) -> str:
    return "; ".join(images[:_SHOWN]) + ("; ..." if len(images) > _SHOWN else "")


def _same_content(root: Path, sources: Iterable[str]) -> list[list[str]]:
    """Groups of two or more sources whose files hold the same bytes. Few files are read in full: those of one size
    that agree in the middle."""
    groups = [list(sources)]
    with ThreadPoolExecutor(content.THREADS) as pool:
        for look in (content.size, content.middle, content.whole):
            finer: list[list[str]] = []
            for group in groups:
                by_look: dict[Hashable, list[str]] = defaultdict(list)
                for source, seen in zip(group, pool.map(look, [root / name for name in group]), strict=True):
                    if seen is not None:
                        by_look[seen].append(source)
                finer += [same for same in by_look.values() if len(same) > 1]
            groups = finer
    return groups
