"""Several processes of one run: all compute the same, the first writes files, and decisions are agreed upon.

They share the file system of the working directory. With one process nothing here communicates.
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
HEARTBEAT = 20  # seconds without a sign of life after which a process counts as gone, and the others end

# What a shell prints if this process ends otherwise than by itself: later, and while it still connects.
GONE = (
    'error: this process was ended from outside: killed, or by JAX, because another process of this run is gone (its '
    'own log says why); the same command, started everywhere, goes on from the newest checkpoint'
)
APART = (
    'error: the processes of this run did not find each other within {} seconds: were all of them started, with the '
    'same --num_processes, and is {} the address of process 0? (docs/scaling.md)'
)

# What to call when this process ends by itself, or moves on from connecting to computing.
_WATCHES: list[Callable[[], object]] = []


class ProcessError(SparseloraError, RuntimeError):
    """Processes that do not find each other, or something that the first of them could not do."""


def connect(
    coordinator: str | None = None, count: int | None = None, index: int | None = None, *, timeout: int = JOIN
) -> None:
    """Connect to the other processes of the run, before anything is computed.

    JAX ends a process that waits for others in vain by abort(); a line then says so.

    Args:
      coordinator: `host:port` of process 0. Where this and the next two are None, JAX takes them from the environment
        (Cloud TPU, GKE, SLURM, Open MPI).
      count: number of processes.
      index: number of this process, from 0.
      timeout: seconds to wait for the others.

    Raises:
      ProcessError: the environment does not tell, or flags contradict each other.
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
            '--process_id=I, or start it where JAX finds them itself (docs/scaling.md)'
        ) from None
    finally:
        _dismiss_watches()
    _watch(GONE)


def _watch(message: str) -> None:
    """Start a shell that prints a message if this process ends otherwise than by itself.

    JAX ends the processes that are left by abort(), with a stack trace of C++ and no way to catch it.
    """
    # The shell waits for a line on its standard input: if this process dies, the pipe closes without one. A session of
    # its own keeps it from signals that are meant for this process, such as Ctrl-C.
    shell = ['sh', '-c', 'read -r line; test "$line" = done || echo "$0" >&2', message]
    watch = subprocess.Popen(shell, stdin=subprocess.PIPE, text=True, start_new_session=True)
    _WATCHES.append(lambda: watch.communicate('done\n'))
    atexit.register(_dismiss_watches)


def _dismiss_watches() -> None:
    """Tell the shells that watch this process to end without a word."""
    while _WATCHES:
        _WATCHES.pop()()


def leave(error: Exception) -> None:
    """End one of several processes at once, for an error that the others need not have.

    The others find out by its missing signs of life.

    Args:
      error: what to print.
    """
    print(f'error: process {jax.process_index()}: {error}', file=sys.stderr, flush=True)
    _dismiss_watches()
    os._exit(1)  # without handlers of atexit: JAX's would wait for the others


@contextmanager
def joint() -> Iterator[None]:
    """Turn JAX's error about a missing process into one that says so.

    Raises:
      ProcessError: another process is gone, or cannot be reached.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        line = str(error).splitlines()[0]  # the rest are stack traces of C++
        raise ProcessError(f'another process of this run is gone, or out of reach; its log says why ({line})') from None


def first() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def wait(what: str) -> None:
    """Wait until all processes are here.

    Args:
      what: a name for this point of the program, the same in all processes.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agreed(decide: Callable[[], Result]) -> Result:
    """Call `decide()` in process 0 and return its result in every process.

    Args:
      decide: returns what JSON can hold.

    Raises:
      SparseloraError, OSError: what it raises in process 0; in the others a ProcessError with the same message.
    """
    if jax.process_count() == 1:
        return decide()
    value = None
    error = None
    if first():
        try:
            value = decide()
        except (SparseloraError, OSError) as raised:
            # Raised below: the others wait for the broadcast.
            error = raised
    text = json.dumps([value, None if error is None else str(error)]).encode()
    # A broadcast needs an array of the same shape in all processes: first the number of bytes, then the bytes.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.frombuffer(text.ljust(size)[:size], np.uint8)
    value, message = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())
    if error is not None:
        raise error
    if message is not None:
        raise ProcessError(f'process 0: {message}')
    return value


def first_then_others(do: Callable[[], Result]) -> Result:
    """Call `do()` in each process; the others wait until process 0, which may write files, is done.

    Args:
      do: returns anything.
    """
    results = []
    agreed(lambda: results.append(do()))
    return results[0] if results else do()


def on_host(array: ArrayLike) -> Shaped[np.ndarray, '...']:
    """Return all of an array; every process must call this.

    Args:
      array: on this process's devices, or on those of several processes.
    """
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def on_first(array: ArrayLike) -> Shaped[np.ndarray, '...'] | None:
    """Return all of an array in process 0, None in the others, which must call this too.

    Args:
      array: see `on_host`.
    """
    whole = on_host(array)
    return whole if first() else None
