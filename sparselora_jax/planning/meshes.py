"""Finds the meshes of a number of chips that a recipe can run on, those first that send and read least by shapes."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jax.sharding import AbstractMesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from sparselora_jax.planning import memory, plan
from sparselora_jax.planning.chips import Chip
from sparselora_jax.planning.tracing import ModelConfig, batch_of, stacks
from sparselora_jax.recipe import ConfigError, check_batches, runs_teacher
from sparselora_jax.sparse import rules, sharding

OF_TENSOR = 2  # sums of hidden states that tensor needs in a block and pass: after attention, after the MLP
RING = 2  # times that an all-reduce around a ring sends each byte: to add up, and to hand out the sum


class Candidate(NamedTuple):
    """A mesh, before anything is compiled for it.

    Attributes:
      axes: number of devices along data, fsdp and tensor.
      total: bytes on a chip, by shapes.
      seconds: time that a restoration step takes to send and to read weights, one after the other. Matmuls take the
        same time on all meshes, so this is enough to compare meshes by.
    """

    axes: dict[str, int]
    total: int
    seconds: float


def candidates(
    cfg: ModelConfig,
    config: ConfigDict,
    chip: Chip,
    chips: int,
    stage: Callable[[memory.Recipe], memory.Stage],
) -> list[Candidate]:
    """Return the meshes of all chips that a stage of a recipe fits on by shapes, the fastest first.

    Meshes that split a batch, a block's kernel or a tower's heads unevenly are left out.

    Args:
      cfg: our config of the model.
      config: the recipe; its own mesh is not looked at.
      chip: the kind of chip.
      chips: their number.
      stage: one of `memory.STAGES`.
    """
    # The trees are the same on every mesh, so they are traced once.
    one_device = memory.recipe(cfg, config)
    fitting = []
    for axes in _factors(chips):
        config = config.copy_and_resolve_references()
        config.mesh.update(axes)
        try:
            check_batches(config)
        except ConfigError:
            continue
        mesh = AbstractMesh(tuple(axes.values()), sharding.AXES) if chips > 1 else None
        trees = one_device._replace(config=config, mesh=mesh)
        if mesh is not None and _is_uneven(trees):
            continue
        # Most meshes that do not fit are told by their params alone, before anything is traced.
        if memory.load(trees).held['params'] > chip.memory:
            continue
        total = stage(trees).total
        if total <= chip.memory:
            sending = sent(trees) / chip.links_s
            reading = plan.weights_read(trees, plan.held_by_shapes(trees)) / chip.bytes_s
            fitting.append(Candidate(axes, total, sending + reading))
    return sorted(fitting, key=lambda candidate: candidate.seconds)


def _factors(chips: int) -> Iterator[dict[str, int]]:
    """Yield the axes of every mesh of this many chips."""
    for tensor in range(1, chips + 1):
        for fsdp in range(1, chips // tensor + 1):
            if chips % (tensor * fsdp) == 0:
                yield {'data': chips // (tensor * fsdp), 'fsdp': fsdp, 'tensor': tensor}


def _is_uneven(trees: memory.Recipe) -> bool:
    """Return whether the mesh splits the heads of a tower, or a kernel of a block, into parts of different sizes."""
    towers = (getattr(trees.cfg, name, None) for name in ('vision', 'qformer', 'language'))
    if any(tower.heads % trees.mesh.shape['tensor'] for tower in towers if tower is not None):
        return True
    # Kernels outside of blocks may lie whole on every chip: a head is one kernel beside hundreds.
    flat = rules.flatten(trees.params)
    blocks = rules.unflatten({path: leaf for path, leaf in flat.items() if rules.is_in_block(path)})
    return bool(sharding.undivided(blocks, trees.mesh))


def sent(trees: memory.Recipe) -> float:
    """Return the bytes that a chip sends in a restoration step, by shapes.

    Along fsdp weights are gathered, once a pass and micro-batch. Along data and fsdp LoRA's gradients are added up.
    Along tensor hidden states are added up, twice a block and pass.

    Args:
      trees: of the recipe.
    """
    if trees.mesh is None:
        return 0.0
    config = trees.config.restore
    rows = trees.mesh.shape['data'] * trees.mesh.shape['fsdp']
    tensor = trees.mesh.shape['tensor']
    # The same mesh with its fsdp axis turned into data: what a device holds there is what it gathers here.
    gathered_mesh = AbstractMesh((rows, 1, tensor), sharding.AXES)

    def gathered(tree: PyTree) -> int:
        return memory.on_device(tree, gathered_mesh) - memory.on_device(tree, trees.mesh)

    params, masks = memory.base(trees)
    has_teacher = runs_teacher(trees.config)
    student = gathered(params) + gathered(masks) + gathered(trees.lora)
    weights = plan.PASSES * student + has_teacher * gathered(trees.params)
    # A chip does not send its own share.
    factors = RING * memory.on_device(trees.lora, gathered_mesh) * (rows - 1) / rows
    # Tracing takes a second; without a tensor axis no hidden states are sent.
    hidden = 0
    if tensor > 1:
        batch = batch_of(trees.cfg, trees.config.text, config.batch // config.accumulate // rows)
        hidden = sum(stack.depth * stack.hidden for stack in stacks(trees.cfg, trees.params, batch))
    # The teacher's forward is one pass more, and so is a forward that remat repeats.
    passes = plan.PASSES + has_teacher + config.remat
    sums = OF_TENSOR * passes * RING * hidden * (tensor - 1) / tensor
    return config.accumulate * (weights + sums) + factors
