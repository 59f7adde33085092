"""Many processes of one run: all compute the same, the first writes, and what decides how to go on is agreed upon.

They share the workdir's file system. With one process nothing here communicates.
"""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped

from sparselora_jax.runtime.errors import SparseloraError

JOIN = 120  # seconds for all processes to come
HEARTBEAT = 20  # seconds without a sign of life after which a process counts as gone, and the others end
GONE = (
    'error: this process was ended from outside: killed, or by JAX, because another process of this run is gone (its '
    'own log says why); the same command, started everywhere, goes on from the newest checkpoint'
)
APART = (
    'error: the processes of this run did not find each other within {} seconds: were all of them started, with the '
    'same --num_processes, and does {} lead to the first? (docs/scaling.md)'
)


class ProcessError(SparseloraError, RuntimeError):
    """Processes that do not find each other, or what the first of them could not do."""


def connect(
    coordinator: str | None = None, count: int | None = None, index: int | None = None, *, timeout: int = JOIN
) -> None:
    """Joins the others; before anything is computed.

    JAX ends a process that waits for others in vain by abort(); a line then says so.

    Args:
      coordinator: `host:port` of the first process; None, as the other two: what the environment says (Cloud TPU, GKE,
        SLURM, Open MPI; JAX knows them).
      timeout: seconds for the others to come.

    Raises:
      ProcessError: the environment says nothing, or flags contradict each other.
    """
    _say_when_ended(APART.format(timeout, coordinator or 'the address that JAX found'))
    try:
        timeouts = {'heartbeat_timeout_seconds': HEARTBEAT, 'shutdown_timeout_seconds': HEARTBEAT}
        jax.distributed.initialize(coordinator, count, index, initialization_timeout=timeout, **timeouts)
    except (ValueError, RuntimeError) as error:
        raise ProcessError(
            f'the processes of this run cannot be joined ({error}); pass --coordinator=HOST:PORT --num_processes=N '
            '--process_id=I, or start it where JAX finds them itself (docs/scaling.md)'
        ) from None
    finally:
        _end()
    _say_when_ended(GONE)


def _say_when_ended(what: str) -> None:
    """Has a shell say what happened should this process end otherwise than by itself.

    JAX ends the processes that are left by abort(), with a stack trace of C++ and no way to catch it.
    """
    shell = ['sh', '-c', 'read -r line; test "$line" = done || echo "$0" >&2', what]
    watch = subprocess.Popen(shell, stdin=subprocess.PIPE, text=True, start_new_session=True)
    _AT_THE_END.append(lambda: watch.communicate('done\n'))
    atexit.register(_end)


_AT_THE_END: list[Callable[[], object]] = []


def _end() -> None:
    while _AT_THE_END:
        _AT_THE_END.pop()()


def leave(error: Exception) -> None:
    """Ends one of many processes for an error that others need not have: at once, where JAX would wait for them.

    They find out by its missing signs of life.
    """
    print(f'error: process {jax.process_index()}: {error}', file=sys.stderr, flush=True)
    _end()
    os._exit(1)


@contextmanager
def joint() -> Iterator[None]:
    """What cuts a run of many processes short, as an error that says so.

    Raises:
      ProcessError: another process is gone, or cannot be reached.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        line = str(error).splitlines()[0]
        raise ProcessError(f'another process of this run is gone, or out of reach; its log says why ({line})') from None


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


def on_first(array: Any) -> Shaped[np.ndarray, '...'] | None:
    """All of an array, in the process that writes; the others, which must ask too, keep nothing of it."""
    whole = on_host(array)
    return whole if first() else None
