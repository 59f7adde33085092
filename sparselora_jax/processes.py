"""Many processes of one run: all compute the same, the first writes, and what decides how to go on is agreed upon.

They share the workdir's file system. With one process nothing here communicates.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped

from sparselora_jax.errors import SparseloraError

HEARTBEAT = 20  # seconds without a sign of life after which a process counts as gone, and the others end


class ProcessError(SparseloraError, RuntimeError):
    """Processes that do not find each other, or what the first of them could not do."""


def connect(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Joins the others; before anything is computed.

    Args:
      coordinator: `host:port` of the first process; None, as the other two: what the environment says (Cloud TPU, GKE,
        SLURM, Open MPI; JAX knows them).

    Raises:
      ProcessError: the environment says nothing, or the others do not come.
    """
    try:
        jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        raise ProcessError(
            f'the processes of this run cannot be joined ({error}); pass --coordinator=HOST:PORT --num_processes=N '
            '--process_id=I, or start it where JAX finds them itself (docs/scaling.md)'
        ) from None


def first() -> bool:
    """Whether this process writes files and speaks."""
    return jax.process_index() == 0


def wait(what: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agreed(decide: Callable[[], Any]) -> Any:
    """What `decide()` says in the first process, as JSON has it, in all of them.

    Raises:
      SparseloraError, OSError: what it raises in the first; in the others a ProcessError that says the same.
    """
    if jax.process_count() == 1:
        return decide()
    value, error = None, None
    if first():
        try:
            value = decide()
        except (SparseloraError, OSError) as raised:
            error = raised
    text = json.dumps([value, None if error is None else str(error)]).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.frombuffer(text.ljust(size)[:size], np.uint8)
    value, said = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())
    if error is not None:
        raise error
    if said is not None:
        raise ProcessError(f'process 0: {said}')
    return value


def first_then_others(do: Callable[[], Any]) -> Any:
    """What `do()` returns, in each process; the others wait until the first, which may write files, is done."""
    done = []
    agreed(lambda: done.append(do()))
    return done[0] if done else do()


def on_host(array: Any) -> Shaped[np.ndarray, '...']:
    """All of an array; every process must ask for it."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
