"""The interface of an allocation, and the registry of the allocations that a recipe may name.

An allocation distributes the zeros of unstructured patterns over the layers of all towers. To add one, write a frozen
dataclass that implements `Allocation` in a file of its own, and register it in `pruning/__init__.py`. A recipe may also
name a class that is not registered, with `config.prune.allocation = 'package.module:Name'`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool

from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.runtime.registry import Registry

# {path: zeros of each layer's kernel}, `[layers]` for a stack.
Zeros = dict[str, np.ndarray]


class AllocationError(SparseloraError, ValueError):
    """An allocation that fails, or an option that cannot work; that message begins with the option's name."""


def check_highest(highest: float) -> None:
    """Check the option `highest` of an allocation: the sparsity that no layer's kernel exceeds.

    Args:
      highest: value of the option.

    Raises:
      AllocationError: it does not lie in (0, 1].
    """
    if not 0 < highest <= 1:
        raise AllocationError(f'highest {highest}: expected a sparsity in (0, 1]')


@dataclass(frozen=True)
class AllocationInputs:
    """Everything that an allocation may use; batches are functions, so unused batches are never read.

    Attributes:
      params: the dense weights; on disk unless the allocation needs the model in memory.
      uniform: zeros under uniform pruning, by path. Only these kernels are pruned, and the sum is the budget.
      sizes: number of weights of one layer's kernel, by path.
      forward: `forward(weights, batch, run)`, as `pruning.prune` takes it.
      loss: `loss(weights, batch, run)` -> a scalar: the mean over the batch.
      calibration: `calibration()` -> the batches that pruning is calibrated on.
      score_batches: `score_batches(samples, batch)` -> `samples` training samples in batches of `batch`.
      is_image: `is_image(batch)` -> which tokens of `input_ids` belong to the image, `[batch, tokens]`; None: the model
        has no images.
      key: key of the random numbers.
      progress: `progress(name, total)` -> `report(done, note)`.
    """

    params: dict
    uniform: Zeros
    sizes: dict[str, int]
    forward: Callable[..., Any]
    loss: Callable[..., Any]
    calibration: Callable[[], list[dict]]
    score_batches: Callable[[int, int], list[dict]]
    is_image: Callable[[dict], Bool[Array, 'batch tokens'] | None]
    key: Array
    progress: Callable[[str, int], Callable[[int, str], None]]


@runtime_checkable
class Allocation(Protocol):
    """One allocation: a frozen dataclass of its options that maps `AllocationInputs` to zeros of each layer's kernel.

    A recipe fills the fields of the dataclass by name from `config.prune.<field>`; a field that the config does not
    have keeps its default. Options are checked in `__post_init__`, which raises `AllocationError`.

    Attributes:
      moves_zeros: whether the number of zeros of a layer may differ from what its pattern says. N:M patterns do not
        allow that.
      needs_model_in_memory: whether the allocation runs the whole model, so that the job cannot prune from disk.
      uses_calibration: whether it calls `calibration`, so that the recipe must ask for samples.
      uses_score_batches: whether it calls `score_batches`, so that the mesh must divide `prune.score_batch`.
    """

    moves_zeros: ClassVar[bool] = True
    needs_model_in_memory: ClassVar[bool] = False
    uses_calibration: ClassVar[bool] = False
    uses_score_batches: ClassVar[bool] = False

    def check(self, uniform: Zeros, sizes: dict[str, int]) -> None:
        """Check, before any work, that the zeros can be allocated whatever the scores; the default accepts all.

        Args:
          uniform: see `AllocationInputs`.
          sizes: see `AllocationInputs`.

        Raises:
          PatternError: they cannot; the message names the option.
        """

    def __call__(self, inputs: AllocationInputs) -> Zeros:
        """Return the zeros of each layer's kernel; their sum is that of `inputs.uniform`.

        Args:
          inputs: what it may use.

        Raises:
          PatternError: the zeros cannot be allocated, for example because a kernel would keep no weight.
        """
        ...


@dataclass(frozen=True)
class Uniform(Allocation):
    """Give each layer the zeros of its pattern; works with N:M patterns too."""

    moves_zeros: ClassVar[bool] = False

    def __call__(self, inputs: AllocationInputs) -> Zeros:
        """Return the zeros of uniform pruning.

        Args:
          inputs: see `AllocationInputs`.
        """
        return inputs.uniform


# Names of `Allocation` classes for `config.prune.allocation`.
ALLOCATIONS: Registry[type] = Registry('prune.allocation')
