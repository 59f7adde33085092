"""Store a teacher's most likely tokens on disk, so that the dense model need not run beside the student."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, PyTree

from sparselora_jax.checkpoints.trees import load_safetensors, save_safetensors
from sparselora_jax.restoration.losses import TopK, top_k
from sparselora_jax.restoration.train import Batches
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.files import StorageError


def keep(
    folder: str | Path,
    logits: Callable[[PyTree, dict], Array],
    weights: PyTree,
    batches: Batches,
    *,
    steps: int,
    k: int,
    temperature: float,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Write `top_k` of the logits of each batch, one file a step.

    Existing files are kept, so an interrupted run continues where it stopped.

    Args:
      folder: folder of the files.
      logits: `logits(weights, batch)`, the forward that `make_train_step` takes.
      weights: the dense model.
      batches: `batches[i]` is the batch of step i.
      steps: number of batches.
      k: number of tokens to store per position, see `losses.top_k`.
      temperature: divides the logits; must equal the temperature of restoration.
      progress: called with the number of steps done, after each new file.

    Returns:
      Bytes of all files on disk.

    Raises:
      StorageError: a file cannot be written.
    """
    # Jitted once: `top_k` runs on the device, so logits of the whole vocabulary never reach the host.
    likeliest = jax.jit(lambda weights, batch: top_k(logits(weights, batch), k, temperature=temperature))
    for step in range(steps):
        if not processes.agreed(_file(folder, step).exists):
            save_safetensors(_file(folder, step), likeliest(weights, batches[step])._asdict())
            progress(step + 1)
    return sum(_file(folder, step).stat().st_size for step in range(steps))


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
