"""What a recipe's programs ask of a slice of chips, from their compilation: bytes, FLOPs, what is sent, time, money."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from sparselora_jax.planning import flops, memory
from sparselora_jax.planning.chips import Chip
from sparselora_jax.planning.collectives import by_kind, collectives
from sparselora_jax.planning.programs import Pass
from sparselora_jax.planning.tracing import batch_of, nbytes, stacks
from sparselora_jax.recipe import runs_teacher

PASSES = 2  # over the student's weights: forward, and backward (which reads them again)


class Roofline(NamedTuple):
    """Seconds that a step takes at least, by what it would be bound by."""

    matmuls: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The largest: the three overlap at best."""
        return max(self)

    @property
    def bound(self) -> str:
        """Which it is."""
        return self._fields[self.index(self.seconds)]


def bytes_on_chip(tree: Any) -> int:
    """Of a tree of shapes with shardings, as `programs.placed` makes them: those that lie on one chip."""
    shards = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype), tree)
    return nbytes(shards)


def held(arguments: tuple) -> dict[str, int]:
    """Bytes on one chip of each of a step's arguments, by what they are."""
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


def held_by_shapes(made: memory.Recipe) -> dict[str, int]:
    """`held`, but for the batch, before there are arguments."""
    params, masks = memory.base(made)
    trained = memory.on_device(made.lora, made.mesh)
    return {
        'params': memory.on_device(params, made.mesh),
        'masks': memory.on_device(masks, made.mesh),
        'teacher': memory.on_device(made.params, made.mesh) if memory.holds_teacher(made) else 0,
        'trained': trained,
        'optimizer': 2 * trained,
    }


def restore(made: memory.Recipe, arguments: tuple, compiled: Any, chip: Chip) -> dict[str, Any]:
    """What one step asks of each chip.

    Args:
      arguments: shapes with shardings; compiled: the step, compiled for them.

    Returns:
      JSON: `bytes` by what they are, `temporary` and `total`, `fits`; `flops`; `collectives` by kind (how many, bytes
      sent); `roofline` in seconds, by term; `compiler_s`, the compiler's own estimate, each loop counted once, or None.
    """
    chips, parts = _chips(made), held(arguments)
    outputs, temporary, total = _asked(compiled)
    sent = by_kind(collectives(compiled.as_text(), chips))
    per_chip = flops.train_step(made) / chips
    read = weights_read(made, parts) + 2 * temporary
    parts |= {'outputs': outputs, 'temporary': temporary}
    return _figures(chips, parts, total, per_chip, read, sent, chip) | {'compiler_s': _estimated(compiled)}


def calibrate(made: memory.Recipe, passes: Sequence[tuple[Pass, Any]], chip: Chip) -> dict[str, Any]:
    """What calibrating the whole model asks of each chip: each program as often as it runs.

    Pruning itself, between the programs, is not in it.

    Args:
      passes: those of `programs.calibration`, each with its compilation.

    Returns:
      See `restore`. `bytes` are those that the pruner holds all along, by shapes, and what the largest program asks
      for beside them.
    """
    chips, kinds, read, per_chip, estimated = _chips(made), {}, 0, 0.0, 0.0
    for one, compiled in passes:
        found, runs = compiled.memory_analysis(), one.runs
        read += runs * (found.argument_size_in_bytes + found.output_size_in_bytes + 2 * found.temp_size_in_bytes)
        per_chip += runs * flops.matmul_flops(one.program, *one.arguments) / chips
        for kind, (count, size) in by_kind(collectives(compiled.as_text(), chips)).items():
            before = kinds.get(kind, (0, 0.0))
            kinds[kind] = before[0] + runs * count, before[1] + runs * size
        estimated += runs * (_estimated(compiled) or float('nan'))
    parts = memory.prune(made).held | {'a block and a chunk in it': max(_asked(compiled)[2] for _, compiled in passes)}
    known = {'compiler_s': estimated if estimated == estimated else None}
    return _figures(chips, parts, sum(parts.values()), per_chip, read, kinds, chip) | known


def _chips(made: memory.Recipe) -> int:
    return made.mesh.size if made.mesh else 1


def _asked(compiled: Any) -> tuple[int, int, int]:
    """Bytes on a chip of (outputs that take no argument's place, what is temporary, all with the arguments)."""
    found = compiled.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return outputs, found.temp_size_in_bytes, found.argument_size_in_bytes + outputs + found.temp_size_in_bytes


def _estimated(compiled: Any) -> float | None:
    seconds = (compiled.cost_analysis() or {}).get('optimal_seconds', 0.0)  # negative where it counts collectives
    return seconds if seconds > 0 else None


def _figures(
    chips: int, parts: dict[str, int], total: int, per_chip: float, read: int, sent: dict[str, tuple], chip: Chip
) -> dict[str, Any]:
    line = Roofline(per_chip / chip.flops_s, read / chip.bytes_s, sum(size for _, size in sent.values()) / chip.links_s)
    return {
        'chips': chips,
        'bytes': parts,
        'total': total,
        'fits': total <= chip.memory,
        'flops': per_chip,
        'collectives': {kind: {'runs': runs, 'bytes': size} for kind, (runs, size) in sent.items()},
        'roofline': line._asdict() | {'seconds': line.seconds, 'bound': line.bound},
    }


def weights_read(made: memory.Recipe, parts: dict[str, int]) -> int:
    """Bytes of weights that one chip reads in a step: gathered along fsdp, once a pass and micro-batch.

    Args:
      parts: what a chip holds; see `held`.
    """
    gathered = made.config.mesh.fsdp
    student = PASSES * (parts['params'] + parts['masks'])
    teacher = parts['teacher'] or (parts['params'] if runs_teacher(made.config) else 0)
    return made.config.restore.accumulate * gathered * (student + teacher) + 3 * (parts['trained'] + parts['optimizer'])


def throughput(
    made: memory.Recipe, samples: int, seconds: float, chips: int, dollars_hour: float | None
) -> dict[str, float | None]:
    """Of programs that take so long for these samples: samples and tokens a second, and dollars for 25,000 samples.

    Tokens are those that the language tower reads, image tokens among them. Without a price there are no dollars.
    """
    rate = samples / seconds
    tokens = sum(stack.x.shape[1] for stack in _language(made))
    dollars = None if dollars_hour is None else 25_000 / rate / 3600 * chips * dollars_hour
    return {'samples_s': rate, 'tokens_s': rate * tokens, 'dollars_25k': dollars}


def _language(made: memory.Recipe) -> list[Any]:
    batch = batch_of(made.cfg, made.config.text, 1)
    return [stack for stack in stacks(made.cfg, made.params, batch) if stack.tower.startswith('language')]
