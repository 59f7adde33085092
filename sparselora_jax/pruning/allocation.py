"""What an allocation is, and the names of the allocations that a recipe may ask for.

An allocation shares the zeros that unstructured patterns ask for out over the layers of all towers. To add one, write a
frozen dataclass that implements `Allocation` in a file of its own, and register it in `pruning/__init__.py`. A recipe
may also name a class that is registered nowhere, as `config.prune.allocation = 'package.module:Name'`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array

from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.runtime.registry import Registry

# {path: zeros of each layer's kernel}, `[layers]` for a stack.
Zeros = dict[str, np.ndarray]


class AllocationError(SparseloraError, ValueError):
    """An option of an allocation that cannot work; the message begins with the option's name."""


@dataclass(frozen=True)
class AllocationInputs:
    """What an allocation may use. Batches are functions, so that none is read that no allocation asks for.

    Attributes:
      params: the dense weights; on disk unless the allocation needs the model in memory.
      uniform: what uniform pruning would make: its kernels are pruned, its sum is the budget.
      sizes: weights of one layer's kernel, by path.
      forward: `forward(weights, batch, run)`, as `pruning.prune` takes it.
      loss: `loss(weights, batch, run)` -> a scalar: the mean over the batch.
      calibration: `calibration()` -> the batches that pruning is calibrated on.
      score_batches: `score_batches(samples, batch)` -> `samples` training samples in batches of `batch`.
      key: of random numbers.
      progress: `progress(name, total)` -> `report(done, note)`.
    """

    params: dict
    uniform: Zeros
    sizes: dict[str, int]
    forward: Callable[..., Any]
    loss: Callable[..., Any]
    calibration: Callable[[], list[dict]]
    score_batches: Callable[[int, int], list[dict]]
    key: Array
    progress: Callable[[str, int], Callable[[int, str], None]]


@runtime_checkable
class Allocation(Protocol):
    """One allocation: a frozen dataclass of its options that maps `AllocationInputs` to zeros of each layer's kernel.

    A recipe fills the fields of the dataclass by name from `config.prune.<field>`; a field that the config does not
    have keeps its default. Options are checked in `__post_init__`, which raises `AllocationError`.

    Attributes:
      moves_zeros: whether layers get other numbers of zeros than their pattern says. N:M patterns leave nothing to
        move.
      needs_model_in_memory: whether it runs the whole model, so that it cannot prune from disk.
      uses_score_batches: whether it calls `score_batches`, so that the mesh must divide `prune.score_batch`.
    """

    moves_zeros: ClassVar[bool] = True
    needs_model_in_memory: ClassVar[bool] = False
    uses_score_batches: ClassVar[bool] = False

    def check(self, uniform: Zeros, sizes: dict[str, int]) -> None:
        """Check before any work that zeros can be shared out, whatever the scores; the default accepts all.

        Args:
          uniform: see `AllocationInputs`.
          sizes: see `AllocationInputs`.

        Raises:
          PatternError: they cannot; names the option.
        """

    def __call__(self, inputs: AllocationInputs) -> Zeros:
        """Return the zeros of each layer's kernel; their sum is that of `inputs.uniform`.

        Args:
          inputs: what it may use.

        Raises:
          PatternError: a kernel would keep no weight, or the like.
        """
        ...


@dataclass(frozen=True)
class Uniform(Allocation):
    """Leave each layer what its pattern says; N:M patterns too."""

    moves_zeros: ClassVar[bool] = False

    def __call__(self, inputs: AllocationInputs) -> Zeros:
        """Return what uniform pruning makes.

        Args:
          inputs: see `AllocationInputs`.
        """
        return inputs.uniform


# Names of `Allocation` classes for `config.prune.allocation`.
ALLOCATIONS: Registry[type] = Registry('prune.allocation')
