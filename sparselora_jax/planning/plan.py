"""Estimate what a recipe's compiled programs need on chips: memory, FLOPs, bytes sent, time and money."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from sparselora_jax.planning import flops, memory
from sparselora_jax.planning.chips import Chip
from sparselora_jax.planning.collectives import by_kind, collectives
from sparselora_jax.planning.programs import Pass
from sparselora_jax.planning.tracing import Stack, batch_of, stacks
from sparselora_jax.recipe import runs_teacher

PASSES = 2  # over the student's weights: forward, and backward (which reads them again)
SAMPLES = 25_000  # number of samples of the paper's run, for which a price is computed


class Roofline(NamedTuple):
    """Lower bounds on the seconds of a step, one for each resource.

    Attributes:
      matmuls: FLOPs divided by the chip's rate.
      memory: bytes read and written, divided by the memory's rate.
      links: bytes sent, divided by the links' rate.
    """

    matmuls: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """Return the largest bound, since at best all three overlap."""
        return max(self)

    @property
    def bound(self) -> str:
        """Return the name of the largest bound."""
        return self._fields[self.index(self.seconds)]


def bytes_on_chip(tree: PyTree) -> int:
    """Return the bytes on one chip of a tree of shapes with shardings, see `programs.placed`."""
    return memory.shard_bytes(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))


def held(arguments: tuple) -> dict[str, int]:
    """Return the bytes on one chip of each of a step's arguments.

    Args:
      arguments: (state, frozen, batch), shapes with shardings.
    """
    state, frozen, batch = arguments
    parts = {
        'params': frozen.params,
        'masks': frozen.masks,
        'teacher': frozen.teacher,
        'trained': state.trained,
        'optimizer': state.optimizer,
        'batch': batch,
    }
    return {name: bytes_on_chip(tree) for name, tree in parts.items()}


def held_by_shapes(trees: memory.Recipe) -> dict[str, int]:
    """Return the result of `held`, without the batch, from shapes alone.

    Args:
      trees: trees of the recipe.
    """
    params, masks = memory.base(trees)
    trained = memory.on_device(trees.lora, trees.mesh)
    return {
        'params': memory.on_device(params, trees.mesh),
        'masks': memory.on_device(masks, trees.mesh),
        'teacher': memory.on_device(trees.params, trees.mesh) if memory.holds_teacher(trees) else 0,
        'trained': trained,
        'optimizer': 2 * trained,  # Adam's two moments
    }


def restore(trees: memory.Recipe, arguments: tuple, compiled: jax.stages.Compiled, chip: Chip) -> dict[str, Any]:
    """Estimate what one restoration step needs on each chip.

    Args:
      trees: trees of the recipe.
      arguments: (state, frozen, batch), shapes with shardings.
      compiled: the step, compiled for these arguments.
      chip: the chip it is compiled for.

    Returns:
      JSON. `chips`; `bytes` by kind, their `total`, and whether that `fits`; `flops`; `collectives` by kind (number,
      bytes sent); `roofline` in seconds, by resource; `compiler_s`, the compiler's own estimate, which counts each loop
      once, or None.
    """
    chips = _chips(trees)
    parts = held(arguments)
    usage = _usage(compiled)
    # Temporary arrays are written once and read once, at least.
    read = weights_read(trees, parts) + 2 * usage.temporary
    parts['outputs'] = usage.outputs
    parts['temporary'] = usage.temporary
    figures = _figures(
        chip=chip,
        chips=chips,
        parts=parts,
        total=usage.total,
        flops_on_chip=flops.train_step(trees) / chips,
        read=read,
        sent=by_kind(collectives(compiled.as_text(), chips)),
    )
    return figures | {'compiler_s': _estimated_seconds(compiled)}


def calibrate(trees: memory.Recipe, passes: Sequence[tuple[Pass, jax.stages.Compiled]], chip: Chip) -> dict[str, Any]:
    """Estimate what calibrating the whole model needs on each chip; each program counts as often as it runs.

    Pruning itself, which happens between the programs, is not counted.

    Args:
      trees: trees of the recipe.
      passes: the passes of `programs.calibration`, each with its compiled program.
      chip: the chip they are compiled for.

    Returns:
      See `restore`. `bytes` are those that the pruner holds throughout, estimated from shapes, and the additional bytes
      of the largest program.
    """
    chips = _chips(trees)
    read = 0
    flops_on_chip = 0.0
    estimated = 0.0
    sent: dict[str, tuple[int, float]] = {}
    for one, compiled in passes:
        analysis = compiled.memory_analysis()
        # Temporary arrays are written once and read once, at least.
        once = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + 2 * analysis.temp_size_in_bytes
        read += one.runs * once
        flops_on_chip += one.runs * flops.matmul_flops(one.program, *one.arguments) / chips
        for kind, (count, size) in by_kind(collectives(compiled.as_text(), chips)).items():
            count_before, size_before = sent.get(kind, (0, 0.0))
            sent[kind] = (count_before + one.runs * count, size_before + one.runs * size)
        # If one program has no estimate, the sum has none: NaN stays NaN.
        estimated += one.runs * (_estimated_seconds(compiled) or math.nan)
    # The programs run one after the other, so only the largest counts.
    largest = max(_usage(compiled).total for _, compiled in passes)
    parts = memory.prune(trees).held | {'a block and a chunk in it': largest}
    figures = _figures(
        chip=chip,
        chips=chips,
        parts=parts,
        total=sum(parts.values()),
        flops_on_chip=flops_on_chip,
        read=read,
        sent=sent,
    )
    return figures | {'compiler_s': None if math.isnan(estimated) else estimated}


def _chips(trees: memory.Recipe) -> int:
    return trees.mesh.size if trees.mesh else 1


class _Usage(NamedTuple):
    """Memory of a program on one chip, in bytes.

    Attributes:
      outputs: bytes of outputs that do not reuse a donated argument.
      temporary: bytes of arrays that are neither argument nor output.
      total: bytes of both, and of the arguments.
    """

    outputs: int
    temporary: int
    total: int


def _usage(compiled: jax.stages.Compiled) -> _Usage:
    analysis = compiled.memory_analysis()
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    temporary = analysis.temp_size_in_bytes
    return _Usage(outputs, temporary, analysis.argument_size_in_bytes + outputs + temporary)


def _estimated_seconds(compiled: jax.stages.Compiled) -> float | None:
    """Return the compiler's own estimate, or None if it has none."""
    analysis = compiled.cost_analysis() or {}
    # XLA reports negative seconds if it does not know the cost of a collective.
    seconds = analysis.get('optimal_seconds', 0.0)
    return seconds if seconds > 0 else None


def _figures(
    *,
    chip: Chip,
    chips: int,
    parts: dict[str, int],
    total: int,
    flops_on_chip: float,
    read: int,
    sent: Mapping[str, tuple[int, float]],
) -> dict[str, Any]:
    """Return the figures as JSON; see `restore`.

    Args:
      chip: the kind of chip.
      chips: number of chips.
      parts: bytes on a chip, by kind.
      total: all bytes on a chip.
      flops_on_chip: FLOPs of one chip.
      read: bytes that a chip reads from or writes to memory.
      sent: for each kind of collective, their number and the bytes that a chip sends.
    """
    # Bounds, not estimates: each resource at its published peak, all of them at the same time.
    roofline = Roofline(
        matmuls=flops_on_chip / chip.flops_s,
        memory=read / chip.bytes_s,
        links=sum(size for _, size in sent.values()) / chip.links_s,
    )
    return {
        'chips': chips,
        'bytes': parts,
        'total': total,
        'fits': total <= chip.memory,
        'flops': flops_on_chip,
        'collectives': {kind: {'runs': runs, 'bytes': size} for kind, (runs, size) in sent.items()},
        'roofline': roofline._asdict() | {'seconds': roofline.seconds, 'bound': roofline.bound},
    }


def weights_read(trees: memory.Recipe, parts: Mapping[str, int]) -> int:
    """Return the bytes of weights that one chip reads in a step: gathered along fsdp, once per pass and micro-batch.

    Args:
      trees: trees of the recipe.
      parts: bytes that a chip holds; see `held`.
    """
    gathered = trees.config.mesh.fsdp
    student = PASSES * (parts['params'] + parts['masks'])
    # A teacher without its own kernels reads the student's dense params once more.
    shared = parts['params'] if runs_teacher(trees.config) else 0
    teacher = parts['teacher'] or shared
    # Counted three times: read by the passes, then read and written by the update.
    updated = 3 * (parts['trained'] + parts['optimizer'])
    return trees.config.restore.accumulate * gathered * (student + teacher) + updated


def throughput(
    trees: memory.Recipe, samples: int, seconds: float, chips: int, dollars_hour: float | None
) -> dict[str, float | None]:
    """Return the throughput and the price of processing a number of samples in a given time.

    Args:
      trees: trees of the recipe.
      samples: number of samples.
      seconds: time that they take.
      chips: number of chips.
      dollars_hour: price of one chip per hour; None: not known.

    Returns:
      JSON. `samples_s`, samples per second; `tokens_s`, tokens per second in the language tower, including image
      tokens; `dollars_25k`, dollars for 25,000 samples, or None without a price.
    """
    rate = samples / seconds
    tokens = sum(stack.x.shape[1] for stack in _language_stacks(trees))
    dollars = None if dollars_hour is None else SAMPLES / rate / 3600 * chips * dollars_hour
    return {'samples_s': rate, 'tokens_s': rate * tokens, 'dollars_25k': dollars}


def _language_stacks(trees: memory.Recipe) -> list[Stack]:
    """Return the stacks of the language tower, traced on one sample; an encoder-decoder has two."""
    batch = batch_of(trees.cfg, trees.config.text, 1)
    return [stack for stack in stacks(trees.cfg, trees.params, batch) if stack.tower.startswith('language')]
