"""Store a teacher's most likely tokens on disk, so that the dense model need not run beside the student."""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, PyTree

from sparselora_jax.checkpoints.trees import load_safetensors, save_safetensors
from sparselora_jax.restoration.losses import TopK, top_k
from sparselora_jax.restoration.train import Batches
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.runtime.files import StorageError

HASH = 'sha256'  # the entry of a file's header that holds the hash of its arrays


def keep(
    folder: str | Path,
    logits: Callable[[PyTree, dict], Array],
    weights: PyTree,
    batches: Batches,
    *,
    steps: int,
    k: int,
    temperature: float,
    owner: str = '',
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Write `top_k` of the logits of each batch, one file a step.

    Existing files are kept, so an interrupted run continues where it stopped. Those that are damaged are written again.

    Args:
      folder: folder of the files.
      logits: `logits(weights, batch)`, the forward that `make_train_step` takes.
      weights: the dense model.
      batches: `batches[i]` is the batch of step i.
      steps: number of batches.
      k: number of tokens to store per position, see `losses.top_k`.
      temperature: divides the logits; must equal the temperature of restoration.
      owner: whose logits these are; part of the hash in each file, so that a file of another run is not kept.
      progress: called with the number of steps done, after each new file.

    Returns:
      Bytes of all files on disk.

    Raises:
      StorageError: a file cannot be written.
    """
    # Jitted once: `top_k` runs on the device, so logits of the whole vocabulary never reach the host.
    likeliest = jax.jit(lambda weights, batch: top_k(logits(weights, batch), k, temperature=temperature))
    for step in range(steps):
        file = _file(folder, step)
        if processes.agreed(lambda file=file: _is_whole(file, owner)):
            continue
        arrays = {name: processes.on_host(array) for name, array in likeliest(weights, batches[step])._asdict().items()}
        save_safetensors(file, arrays, metadata={HASH: _hash_of(arrays, owner)})
        progress(step + 1)
    return sum(_file(folder, step).stat().st_size for step in range(steps))


def _hash_of(arrays: Mapping[str, np.ndarray], owner: str) -> str:
    whole = hashlib.sha256(owner.encode())
    for name, array in sorted(arrays.items()):
        whole.update(f'{name} {array.dtype} {array.shape} '.encode())
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


def _is_whole(file: Path, owner: str) -> bool:
    """Return whether a file is there and undamaged; a line says that one is damaged."""
    if not file.exists():
        return False
    try:
        arrays, metadata = load_safetensors(file)
        is_whole = metadata.get(HASH) == _hash_of({name: np.asarray(array) for name, array in arrays.items()}, owner)
    except SparseloraError:
        is_whole = False
    if not is_whole:
        print(f'{file}: damaged, or of another run; it is computed again', file=sys.stderr)
    return is_whole


def read(folder: str | Path, step: int, rows: Sequence[int] | None = None) -> TopK:
    """Read the teacher's most likely tokens for the batch of one step.

    Args:
      folder: folder that `keep` has written.
      step: index of the batch.
      rows: rows of the batch; None: all of them.

    Returns:
      NumPy arrays.

    Raises:
      StorageError: the file is missing or damaged.
    """
    file = _file(folder, step)
    arrays, _ = load_safetensors(file)
    if arrays.keys() != set(TopK._fields):
        raise StorageError(f'{file}: holds {sorted(arrays)}, expected {", ".join(TopK._fields)}')
    chosen = ... if rows is None else rows
    return TopK(
        tokens=np.asarray(arrays['tokens'])[chosen],
        log_probs=np.asarray(arrays['log_probs'])[chosen],
    )


def _file(folder: str | Path, step: int) -> Path:
    """Return the file of one step."""
    return Path(folder) / f'{step:06d}.safetensors'
