"""What a recipe's programs ask of chips, by their compilation: bytes, FLOPs, bytes sent, time and money."""

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
SAMPLES = 25_000  # of the paper's run, whose price is given


class Roofline(NamedTuple):
    """Seconds that a step takes at least, by each thing that may bound it.

    Attributes:
      matmuls: FLOPs over the chip's rate.
      memory: bytes read and written over the memory's rate.
      links: bytes sent over the links' rate.
    """

    matmuls: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """Return the largest: the three overlap at best."""
        return max(self)

    @property
    def bound(self) -> str:
        """Return the name of the largest."""
        return self._fields[self.index(self.seconds)]


def bytes_on_chip(tree: PyTree) -> int:
    """Return the bytes that lie on one chip of a tree of shapes with shardings, as `programs.placed` makes them."""
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
    """Return the same as `held`, but for the batch, before there are arguments.

    Args:
      trees: of the recipe.
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
    """Return what one restoration step asks of each chip.

    Args:
      trees: of the recipe.
      arguments: (state, frozen, batch), shapes with shardings.
      compiled: the step, compiled for them.
      chip: what it is compiled for.

    Returns:
      JSON. `chips`; `bytes` by what they are, their `total`, and whether it `fits`; `flops`; `collectives` by kind (how
      many, bytes sent); `roofline` in seconds, by term; `compiler_s`, the compiler's own estimate, which counts each
      loop once, or None.
    """
    chips = _chips(trees)
    parts = held(arguments)
    usage = _usage(compiled)
    # What is temporary is written and read once, at least.
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
    """Return what calibrating the whole model asks of each chip: each program counts as often as it runs.

    Pruning itself, between the programs, is not counted.

    Args:
      trees: of the recipe.
      passes: those of `programs.calibration`, each with its compilation.
      chip: what they are compiled for.

    Returns:
      See `restore`. `bytes` are those that the pruner holds all along, by shapes, and those that the largest program
      asks for beside them.
    """
    chips = _chips(trees)
    read = 0
    flops_on_chip = 0.0
    estimated = 0.0
    sent: dict[str, tuple[int, float]] = {}
    for one, compiled in passes:
        analysis = compiled.memory_analysis()
        # What is temporary is written and read once, at least.
        once = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + 2 * analysis.temp_size_in_bytes
        read += one.runs * once
        flops_on_chip += one.runs * flops.matmul_flops(one.program, *one.arguments) / chips
        for kind, (count, size) in by_kind(collectives(compiled.as_text(), chips)).items():
            count_before, size_before = sent.get(kind, (0, 0.0))
            sent[kind] = (count_before + one.runs * count, size_before + one.runs * size)
        # One program without an estimate leaves none for all: NaN stays NaN.
        estimated += one.runs * (_estimated_seconds(compiled) or math.nan)
    # The programs run one after the other, so the largest alone counts.
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
    """Bytes of a program on one chip.

    Attributes:
      outputs: of outputs that do not take the place of a donated argument.
      temporary: of what is neither argument nor output.
      total: of both, and of the arguments.
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
    """Return the compiler's own estimate; None where it makes none."""
    analysis = compiled.cost_analysis() or {}
    # XLA reports negative seconds where it does not know the cost of a collective.
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
      parts: bytes on a chip, by what they are.
      total: bytes on a chip.
      flops_on_chip: FLOPs of one chip.
      read: bytes that a chip reads or writes.
      sent: for each kind of collective, how many run and the bytes that a chip sends.
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
    """Return the bytes of weights that one chip reads in a step: gathered along fsdp, once a pass and micro-batch.

    Args:
      trees: of the recipe.
      parts: what a chip holds; see `held`.
    """
    gathered = trees.config.mesh.fsdp
    student = PASSES * (parts['params'] + parts['masks'])
    # A teacher without kernels of its own is the student's dense params, read once more.
    shared = parts['params'] if runs_teacher(trees.config) else 0
    teacher = parts['teacher'] or shared
    # Counted thrice: read by the passes, then read and written by the update.
    updated = 3 * (parts['trained'] + parts['optimizer'])
    return trees.config.restore.accumulate * gathered * (student + teacher) + updated


def throughput(
    trees: memory.Recipe, samples: int, seconds: float, chips: int, dollars_hour: float | None
) -> dict[str, float | None]:
    """Return the rates and the price of programs that take a time for a number of samples.

    Args:
      trees: of the recipe.
      samples: their number.
      seconds: that they take.
      chips: number of chips.
      dollars_hour: price of one chip and hour; None: not known.

    Returns:
      JSON. `samples_s`, samples a second; `tokens_s`, tokens a second that the language tower reads, image tokens
      included; `dollars_25k`, dollars for 25,000 samples, or None without a price.
    """
    rate = samples / seconds
    tokens = sum(stack.x.shape[1] for stack in _language_stacks(trees))
    dollars = None if dollars_hour is None else SAMPLES / rate / 3600 * chips * dollars_hour
    return {'samples_s': rate, 'tokens_s': rate * tokens, 'dollars_25k': dollars}


def _language_stacks(trees: memory.Recipe) -> list[Stack]:
    """Return the stacks of the language tower, traced on one sample; an encoder-decoder has two."""
    batch = batch_of(trees.cfg, trees.config.text, 1)
    return [stack for stack in stacks(trees.cfg, trees.params, batch) if stack.tower.startswith('language')]
