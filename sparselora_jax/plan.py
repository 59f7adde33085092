"""What a restoration step asks of a slice of chips, from its compilation: bytes, FLOPs, what is sent, time, money."""

from typing import Any, NamedTuple

import jax

from sparselora_jax import flops, memory
from sparselora_jax.chips import Chip
from sparselora_jax.collectives import by_kind, collectives
from sparselora_jax.recipe import runs_teacher
from sparselora_jax.tracing import batch_of, nbytes, stacks

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


def restore(made: memory.Recipe, arguments: tuple, compiled: Any, chip: Chip) -> dict[str, Any]:
    """What one step asks of each chip.

    Args:
      arguments: shapes with shardings; compiled: the step, compiled for them.

    Returns:
      JSON: `bytes` by what they are, `temporary` and `total`, `fits`; `flops`; `collectives` by kind (how many, bytes
      sent); `roofline` in seconds, by term; `compiler_s`, the compiler's own estimate, each loop counted once, or None.
    """
    chips, found = made.mesh.size if made.mesh else 1, compiled.memory_analysis()
    parts = held(arguments)
    temporary = found.temp_size_in_bytes
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes  # that take no argument's place
    total = found.argument_size_in_bytes + outputs + temporary
    sent = by_kind(collectives(compiled.as_text(), chips))
    per_chip = flops.train_step(made) / chips
    line = Roofline(
        per_chip / chip.flops_s,
        (_weights_read(made, parts) + 2 * temporary) / chip.bytes_s,
        sum(size for _, size in sent.values()) / chip.links_s,
    )
    estimated = (compiled.cost_analysis() or {}).get('optimal_seconds', 0.0)  # negative where it counts collectives
    return {
        'chips': chips,
        'bytes': parts | {'outputs': outputs, 'temporary': temporary},
        'total': total,
        'fits': total <= chip.memory,
        'flops': per_chip,
        'collectives': {kind: {'runs': runs, 'bytes': size} for kind, (runs, size) in sent.items()},
        'roofline': line._asdict() | {'seconds': line.seconds, 'bound': line.bound},
        'compiler_s': estimated if estimated > 0 else None,
    }


def _weights_read(made: memory.Recipe, parts: dict[str, int]) -> int:
    """Bytes of weights that one chip reads in a step: gathered along fsdp, once a pass and micro-batch."""
    gathered = made.config.mesh.fsdp
    student = PASSES * (parts['params'] + parts['masks'])
    teacher = parts['teacher'] or (parts['params'] if runs_teacher(made.config) else 0)
    return made.config.restore.accumulate * gathered * (student + teacher) + 3 * (parts['trained'] + parts['optimizer'])


def throughput(made: memory.Recipe, seconds: float, chips: int, dollars_hour: float) -> dict[str, float]:
    """Of steps that take so long: samples and tokens a second, and dollars for 25,000 samples.

    Tokens are those that the language tower reads, image tokens among them.
    """
    samples = made.config.restore.batch / seconds
    tokens = sum(stack.x.shape[1] for stack in _language(made))
    hours = 25_000 / samples / 3600
    return {'samples_s': samples, 'tokens_s': samples * tokens, 'dollars_25k': hours * chips * dollars_hour}


def _language(made: memory.Recipe) -> list[Any]:
    batch = batch_of(made.cfg, made.config.text, 1)
    return [stack for stack in stacks(made.cfg, made.params, batch) if stack.tower.startswith('language')]
