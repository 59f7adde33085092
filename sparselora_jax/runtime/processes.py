"""Helpers for a run of several processes: all run the same program, process 0 writes files and decides.

All processes must see the same working directory. With a single process, nothing here communicates.
"""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import ArrayLike
from jaxtyping import Shaped

from sparselora_jax.runtime.errors import SparseloraError

Result = TypeVar('Result')

JOIN = 120  # seconds for all processes to connect
HEARTBEAT = 20  # seconds without a heartbeat after which a process counts as lost, and the others end

# What a watching shell prints if this process is killed: GONE while it computes, APART while it still connects.
GONE = (
    'error: this process was killed, or JAX ended it because another process of this run is gone (the log of that '
    'process says why); to resume from the newest checkpoint, run the same command in all processes again'
)
APART = (
    'error: the processes of this run did not find each other within {} seconds: were all of them started, with the '
    'same --num_processes, and is {} the address of process 0? (docs/scaling.md)'
)

# Callbacks that end the watching shells: on a normal exit, or when connecting is over and computing begins.
_WATCHES: list[Callable[[], object]] = []


class ProcessError(SparseloraError, RuntimeError):
    """A failure to connect the processes, a lost process, or an error in process 0."""


def connect(
    coordinator: str | None = None, count: int | None = None, index: int | None = None, *, timeout: int = JOIN
) -> None:
    """Connect to the other processes of the run, before anything is computed.

    If the others do not connect in time, JAX ends this process by abort(). A line on stderr then explains why.

    Args:
      coordinator: `host:port` of process 0. If this, `count` and `index` are None, JAX takes them from the environment
        (Cloud TPU, GKE, SLURM, Open MPI).
      count: number of processes.
      index: number of this process, from 0.
      timeout: seconds to wait for the others.

    Raises:
      ProcessError: the environment does not define these values, or the flags contradict each other.
    """
    _watch(APART.format(timeout, coordinator or 'the address that JAX found'))
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, RuntimeError) as error:
        raise ProcessError(
            f'the processes of this run cannot be joined ({error}); pass --coordinator=HOST:PORT --num_processes=N '
            '--process_id=I, or start it where JAX detects them itself (docs/scaling.md)'
        ) from None
    finally:
        _dismiss_watches()
    _watch(GONE)


def _watch(message: str) -> None:
    """Start a shell that prints a message if this process is killed or aborted.

    When a process is lost, JAX ends the remaining ones by abort(). That prints a C++ stack trace and cannot be caught.
    """
    # The shell waits for a line on its standard input. If this process dies, the pipe closes without a line. The
    # shell runs in a separate session, so that signals to this process, such as Ctrl-C, do not reach it.
    shell = ['sh', '-c', 'read -r line; test "$line" = done || echo "$0" >&2', message]
    watch = subprocess.Popen(shell, stdin=subprocess.PIPE, text=True, start_new_session=True)
    _WATCHES.append(lambda: watch.communicate('done\n'))
    atexit.register(_dismiss_watches)


def _dismiss_watches() -> None:
    """Tell the shells that watch this process to end without printing anything."""
    while _WATCHES:
        _WATCHES.pop()()


def leave(error: Exception) -> None:
    """End this process at once, after an error that the other processes may not have.

    The others notice because its heartbeats stop.

    Args:
      error: the error to print.
    """
    print(f'error: process {jax.process_index()}: {error}', file=sys.stderr, flush=True)
    _dismiss_watches()
    os._exit(1)  # skips atexit handlers: JAX's handler would wait for the others


@contextmanager
def joint() -> Iterator[None]:
    """Turn JAX's error about a lost process into a clear `ProcessError`.

    Raises:
      ProcessError: another process has ended, or cannot be reached.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        line = str(error).splitlines()[0]  # the rest is a C++ stack trace
        raise ProcessError(f'another process of this run is gone or unreachable; its log says why ({line})') from None


def first() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def wait(what: str) -> None:
    """Wait until all processes have called this.

    Args:
      what: a name for this point of the program, the same in all processes.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agreed(decide: Callable[[], Result]) -> Result:
    """Call `decide()` in process 0 and return its result in every process.

    Args:
      decide: must return a value that JSON can represent.

    Raises:
      SparseloraError, OSError: raised in process 0, if `decide` raises it there.
      ProcessError: raised in the other processes, with the same message.
    """
    if jax.process_count() == 1:
        return decide()
    value = None
    error = None
    if first():
        try:
            value = decide()
        except (SparseloraError, OSError) as raised:
            # It is raised only after the broadcast, which the others wait for.
            error = raised
    text = json.dumps([value, None if error is None else str(error)]).encode()
    # A broadcast needs the same array shape in all processes. So send the number of bytes first, then the bytes.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.frombuffer(text.ljust(size)[:size], np.uint8)
    value, message = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())
    if error is not None:
        raise error
    if message is not None:
        raise ProcessError(f'process 0: {message}')
    return value


def first_then_others(do: Callable[[], Result]) -> Result:
    """Call `do()` in process 0, which may write files, and then in all other processes.

    Args:
      do: the function to call; it may return anything.
    """
    results = []
    agreed(lambda: results.append(do()))
    return results[0] if results else do()


def on_host(array: ArrayLike) -> Shaped[np.ndarray, '...']:
    """Return the whole array on the host; every process must call this.

    Args:
      array: may be spread over the devices of several processes.
    """
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def on_first(array: ArrayLike) -> Shaped[np.ndarray, '...'] | None:
    """Return the whole array in process 0 and None in the others; every process must call this.

    Args:
      array: see `on_host`.
    """
    whole = on_host(array)
    return whole if first() else None
