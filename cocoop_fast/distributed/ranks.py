"""Which of a run's processes this one is, and how they exchange values. With one process, nothing here costs anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from cocoop_fast.config import ShardBy
from cocoop_fast.errors import UserError, is_out_of_memory

T = TypeVar("T")

GO_ON = "run the same command again to go on from the last checkpoint"


@dataclass(frozen=True)
class Group:
    """Processes that share a piece of work; by default this one alone.

    All members call the same methods in the same order. Each raises a UserError if another member has ended.

    Args:
        index: the place of this process, in 0 .. size - 1.
        size: members.
        handle: what torch knows it by; ``None``: all processes.
    """

    index: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all members, which have one shape and dtype, in the members' order."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with _collective():
            dist.all_gather(parts, tensor.contiguous(), group=self.handle)
        return parts

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of their tensors, added up in the members' order: every member gets the same bits, each time."""
        total, *others = self.gather(tensor)
        for other in others:
            total = total + other
        return total

    def all_or_none(self, work: Callable[[], T]) -> T:
        """What `work` makes, if memory suffices for it with every member.

        Raises:
            MemoryError: it did not with one of them; with a group of one, what `work` raised.
        """
        if self.size == 1:
            return work()
        made: list[T] = []
        try:
            made.append(work())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Out here, where nothing refers to the tensors of work that failed any more.
        if torch.stack(self.gather(torch.tensor(len(made)))).all():
            return made[0]
        raise MemoryError("a process that shares the work has no memory left")

    def gather_objects(self, value: T) -> list[T]:
        """The values of all members, which need no common type, in the members' order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _collective():
            dist.all_gather_object(values, value, group=self.handle)
        return cast("list[T]", values)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This member's part of the items: consecutive ones, as many as the others' up to one."""
        n = len(items)
        return items[n * self.index // self.size : n * (self.index + 1) // self.size]


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of a run; by default it is alone.

    The ranks form a grid. Those of a row have the same images of each batch and different classes; the rank is
    row * classes.size + column.

    Args:
        everyone: all ranks.
        images: the rows: which share of a batch's images this rank has.
        classes: this row: which share of the classes this rank has.
        local_index, local_size: place among, and number of, the ranks on this machine.
    """

    everyone: Group = field(default_factory=Group)
    images: Group = field(default_factory=Group)
    classes: Group = field(default_factory=Group)
    local_index: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and speaks for all."""
        return self.everyone.index == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, for all."""
        values: list[Any] = [make() if self.is_first else None]
        if self.everyone.size > 1:
            with _collective():
                dist.broadcast_object_list(values, src=0)
        return cast(T, values[0])

    def highest(self, value: int) -> int:
        """The highest of the ranks' values."""
        if self.everyone.size == 1:  # nothing on a device is waited for
            return value
        return int(torch.stack(self.everyone.gather(torch.tensor(value))).max())

    def check_alike(self, what: str, value: object) -> None:
        """Make sure that all ranks have the same value.

        Raises:
            UserError: they have not.
        """
        for rank, other in enumerate(self.everyone.gather_objects(value)):
            if other != value:
                raise UserError(
                    f"Rank {rank} and rank {self.everyone.index} differ in {what}; start all ranks with the same "
                    "command on the same files.",
                    exit_status=1,
                )

    def arranged(self, shard: ShardBy, batch_size: int) -> Ranks:
        """The same ranks in the grid that a way of sharing asks for. All ranks have to call this.

        Raises:
            UserError: see :func:`grid`.
        """
        rows, columns = grid(self.everyone.size, shard, batch_size)
        row, column = divmod(self.everyone.index, columns)
        classes = Group(column, columns)
        if rows > 1 and columns > 1:
            # torch wants every rank to take part in making every group.
            handles = [dist.new_group([*range(i * columns, (i + 1) * columns)]) for i in range(rows)]
            classes = replace(classes, handle=cast(dist.ProcessGroup, handles[row]))
        return replace(self, images=Group(row, rows), classes=classes)

    def own_device(self, configured: str, gpus: int | None = None) -> str:
        """The device of this rank where a configuration says "auto", "cpu", "cuda" or "cuda:N".

        Args:
            gpus: of this machine; None: as many as torch finds.

        Raises:
            UserError: the ranks of this machine would have to share a GPU.
        """
        if self.local_size == 1 or configured == "cpu":
            return configured
        gpus = torch.cuda.device_count() if gpus is None else gpus
        if configured == "auto" and not gpus:
            return "cpu"
        if configured not in ("auto", "cuda"):
            raise UserError(
                f"The device '{configured}' is one, and there are {self.local_size} ranks on this machine; use "
                "--device cuda, which gives each a GPU of its own."
            )
        if self.local_size > gpus:
            raise UserError(
                f"{self.local_size} ranks were started on a machine with {gpus} GPUs; start as many as there are, or "
                "use --device cpu."
            )
        return f"cuda:{self.local_index}"


ALONE = Ranks()


def grid(ranks: int, shard: ShardBy, batch_size: int) -> tuple[int, int]:
    """Into how many parts images and classes are parted, so that every rank has one part of each.

    Args:
        ranks: how many there are.
        shard: what is shared out; "auto": images, or classes if there is one image in a batch.
        batch_size: images of a step, of all ranks together.

    Raises:
        UserError: they cannot be shared evenly that way.
    """
    if shard == "auto":
        shard = "images" if batch_size > 1 else "classes"
    if shard == "classes" or ranks == 1:
        return 1, ranks
    if shard == "images":
        if batch_size % ranks:
            raise UserError(
                f"A batch of {batch_size} cannot be shared evenly by {ranks} ranks; choose a batch size that "
                f"{ranks} divides, or --shard classes."
            )
        return ranks, 1
    rows = [n for n in range(2, ranks) if ranks % n == 0 and batch_size % n == 0]
    if not rows:
        raise UserError(
            f"{ranks} ranks and a batch of {batch_size} cannot be parted by images and classes both; choose a batch "
            f"size that a divisor of {ranks} divides, or --shard images or classes."
        )
    return rows[-1], ranks // rows[-1]


@contextmanager
def _collective() -> Iterator[None]:
    """Of a collective operation that fails, since a member has left: a sentence instead of torch's error."""
    try:
        yield
    except RuntimeError as error:  # torch's own, and those of its libraries
        raise UserError(
            f"Another rank has ended or cannot be reached, so this one ends too; {GO_ON}.", exit_status=1
        ) from error
