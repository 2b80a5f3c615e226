"""Joining the processes that ``torchrun`` has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from cocoop_fast.distributed.heartbeat import Heartbeat
from cocoop_fast.distributed.ranks import Group, Ranks
from cocoop_fast.errors import UserError

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them

# How long a rank may be busy while others wait for it. Whether it is still alive, its heartbeat tells.
_PATIENCE = timedelta(minutes=30)


def launched_ranks() -> int:
    """How many processes were started together, this one included."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _LAUNCHED) else 1


@contextmanager
def join(arrival: timedelta = timedelta(minutes=5)) -> Iterator[Ranks]:
    """The ranks of this run, which end together; this process alone if nothing started several.

    Args:
        arrival: within which all ranks have to come.

    Raises:
        UserError: not all of them have come.
    """
    if launched_ranks() == 1:
        yield Ranks()
        return
    try:
        store, rank, ranks = next(dist.rendezvous("env://", timeout=arrival))
        attempt = os.environ.get(
            "TORCHELASTIC_RESTART_COUNT", "0"
        )  # torchrun keeps its store between attempts
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore(f"collectives/{attempt}", store),
            rank=rank,
            world_size=ranks,
            timeout=_PATIENCE,
        )
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        own_connection = dist.TCPStore(address, port, is_master=False, timeout=arrival)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"The {launched_ranks()} ranks of this run did not find each other ({' '.join(str(error).split())[:200]}); "
            "check that all were started, and MASTER_ADDR and MASTER_PORT.",
            exit_status=1,
        ) from error
    everyone = Group(rank, ranks)
    heartbeat = Heartbeat(dist.PrefixStore(f"heartbeat/{attempt}", own_connection), rank, ranks)
    try:
        yield Ranks(
            everyone,
            local_index=int(os.environ.get("LOCAL_RANK", rank)),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", ranks)),
        )
        everyone.gather_objects(None)  # nobody leaves while another one may still want something
    except (KeyboardInterrupt, SystemExit):  # the others have agreed to it, or will find this rank silent
        heartbeat.stop()
        raise
    except BaseException as error:
        heartbeat.fail(str(error) or type(error).__name__)
        raise
    heartbeat.stop()
    dist.destroy_process_group()
