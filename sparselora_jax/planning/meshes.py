"""Which mesh for a recipe on so many chips: all that can work, those first that send and read least by shapes."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh

from sparselora_jax.planning import memory, plan
from sparselora_jax.planning.chips import Chip
from sparselora_jax.planning.tracing import batch_of, stacks
from sparselora_jax.recipe import ConfigError, check_batches, runs_teacher
from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse import sharding

OF_TENSOR = 2  # sums of hidden states that tensor needs in a block and pass: after attention, after the MLP


class Candidate(NamedTuple):
    """A mesh, before anything is compiled for it.

    Attributes:
      axes: data, fsdp, tensor.
      total: bytes on a chip, by shapes.
      seconds: what a restoration step takes to send and to read weights, one after the other: to compare meshes by;
        matmuls take the same on all.
    """

    axes: dict[str, int]
    total: int
    seconds: float


def candidates(
    cfg: Any, config: Any, chip: Chip, chips: int, stage: Callable[[memory.Recipe], memory.Stage]
) -> list[Candidate]:
    """The meshes of all of these chips that a stage of a recipe fits on by shapes, the fastest first.

    Left out are those that split a batch, a block's kernel or a tower's heads unevenly.

    Args:
      config: its own mesh is not looked at.
      stage: one of `memory.STAGES`.
    """
    whole, found = memory.recipe(cfg, config), []
    for axes in _factors(chips):
        config = config.copy_and_resolve_references()
        config.mesh.update(axes)
        try:
            check_batches(config)
        except ConfigError:
            continue
        mesh = AbstractMesh(tuple(axes.values()), sharding.AXES) if chips > 1 else None
        made = whole._replace(config=config, mesh=mesh)
        if made.mesh is not None and _uneven(made):
            continue
        if memory.load(made).held['params'] > chip.memory:  # before anything is traced
            continue
        if (total := stage(made).total) <= chip.memory:
            seconds = sent(made) / chip.links_s + plan.weights_read(made, plan.held_by_shapes(made)) / chip.bytes_s
            found.append(Candidate(axes, total, seconds))
    return sorted(found, key=lambda one: one.seconds)


def _factors(chips: int) -> Iterator[dict[str, int]]:
    for tensor in range(1, chips + 1):
        for fsdp in range(1, chips // tensor + 1):
            if chips % (tensor * fsdp) == 0:
                yield {'data': chips // (tensor * fsdp), 'fsdp': fsdp, 'tensor': tensor}


def _uneven(made: memory.Recipe) -> bool:
    towers = (getattr(made.cfg, name, None) for name in ('vision', 'qformer', 'language'))
    if any(tower.heads % made.mesh.shape['tensor'] for tower in towers if tower is not None):
        return True
    flat = rules_lib.flatten(made.params)  # a head is one kernel of hundreds: it may lie whole on every chip
    blocks = rules_lib.unflatten({path: leaf for path, leaf in flat.items() if '/blocks/' in path})
    return bool(sharding.undivided(blocks, made.mesh))


def sent(made: memory.Recipe) -> float:
    """Bytes that a chip sends in a restoration step, by shapes.

    Along fsdp weights are gathered, once a pass and micro-batch; along data and fsdp LoRA's gradients are added up;
    along tensor hidden states are, twice a block and pass.
    """
    if made.mesh is None:
        return 0.0
    knobs, (rows, tensor) = (
        made.config.restore,
        (made.mesh.shape['data'] * made.mesh.shape['fsdp'], made.mesh.shape['tensor']),
    )
    whole = AbstractMesh((rows, 1, tensor), sharding.AXES)

    def gathered(tree):
        return memory.on_device(tree, whole) - memory.on_device(tree, made.mesh)

    params, masks = memory.base(made)
    taught = runs_teacher(made.config)
    weights = plan.PASSES * sum(map(gathered, (params, masks, made.lora))) + taught * gathered(made.params)
    factors = 2 * memory.on_device(made.lora, whole) * (rows - 1) / rows
    batch = batch_of(made.cfg, made.config.text, knobs.batch // knobs.accumulate // rows)
    hidden = sum(stack.depth * stack.hidden for stack in stacks(made.cfg, made.params, batch)) if tensor > 1 else 0
    sums = OF_TENSOR * (plan.PASSES + taught + knobs.remat) * 2 * hidden * (tensor - 1) / tensor
    return knobs.accumulate * (weights + sums) + factors
