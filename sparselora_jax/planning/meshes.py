"""Find the meshes that a recipe can run on with a given number of chips, the fastest by shapes first."""

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

OF_TENSOR = 2  # sums of hidden states that the tensor axis needs per block and pass: after attention, after the MLP
RING = 2  # times that a ring all-reduce sends each byte: to compute the sum, and to distribute it


class Candidate(NamedTuple):
    """A mesh, before anything is compiled for it.

    Attributes:
      axes: number of devices along data, fsdp and tensor.
      total: bytes on a chip, estimated from shapes.
      seconds: time that a restoration step takes to send data plus the time to read weights. Matmuls take the same time
        on all meshes, so this is enough to compare meshes.
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
    """Return the meshes of all chips on which a stage of a recipe fits by shapes, the fastest first.

    Meshes that would split a batch, a block's kernel or a tower's heads unevenly are left out.

    Args:
      cfg: our config of the model.
      config: the recipe; its own mesh is ignored.
      chip: the kind of chip.
      chips: number of chips.
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
        # Most meshes that do not fit are found by their params alone, before anything is traced.
        if memory.load(trees).held['params'] > chip.memory:
            continue
        total = stage(trees).total
        if total <= chip.memory:
            sending = sent(trees) / chip.links_s
            reading = plan.weights_read(trees, plan.held_by_shapes(trees)) / chip.bytes_s
            fitting.append(Candidate(axes, total, sending + reading))
    return sorted(fitting, key=lambda candidate: candidate.seconds)


def _factors(chips: int) -> Iterator[dict[str, int]]:
    """Yield the axes of every mesh with this number of chips."""
    for tensor in range(1, chips + 1):
        for fsdp in range(1, chips // tensor + 1):
            if chips % (tensor * fsdp) == 0:
                yield {'data': chips // (tensor * fsdp), 'fsdp': fsdp, 'tensor': tensor}


def _is_uneven(trees: memory.Recipe) -> bool:
    """Return whether the mesh splits the heads of a tower, or a kernel of a block, into parts of different sizes."""
    towers = (getattr(trees.cfg, name, None) for name in ('vision', 'qformer', 'language'))
    if any(tower.heads % trees.mesh.shape['tensor'] for tower in towers if tower is not None):
        return True
    # Kernels outside the blocks may be replicated: a head is only one kernel among hundreds.
    flat = rules.flatten(trees.params)
    blocks = rules.unflatten({path: leaf for path, leaf in flat.items() if rules.is_in_block(path)})
    return bool(sharding.undivided(blocks, trees.mesh))


def sent(trees: memory.Recipe) -> float:
    """Estimate from shapes the bytes that a chip sends in a restoration step.

    Weights are gathered along fsdp, once per pass and micro-batch. LoRA's gradients are summed along data and fsdp.
    Hidden states are summed along tensor, twice per block and pass.

    Args:
      trees: trees of the recipe.
    """
    if trees.mesh is None:
        return 0.0
    config = trees.config.restore
    rows = trees.mesh.shape['data'] * trees.mesh.shape['fsdp']
    tensor = trees.mesh.shape['tensor']
    # The same mesh with its fsdp axis turned into data: what a device holds there is what it gathers on the real mesh.
    gathered_mesh = AbstractMesh((rows, 1, tensor), sharding.AXES)

    def gathered(tree: PyTree) -> int:
        return memory.on_device(tree, gathered_mesh) - memory.on_device(tree, trees.mesh)

    params, masks = memory.base(trees)
    has_teacher = runs_teacher(trees.config)
    student = gathered(params) + gathered(masks) + gathered(trees.lora)
    weights = plan.PASSES * student + has_teacher * gathered(trees.params)
    # A chip does not send its own share.
    factors = RING * memory.on_device(trees.lora, gathered_mesh) * (rows - 1) / rows
    # Tracing takes a second, so it is skipped without a tensor axis, where no hidden states are sent.
    hidden = 0
    if tensor > 1:
        batch = batch_of(trees.cfg, trees.config.text, config.batch // config.accumulate // rows)
        hidden = sum(stack.depth * stack.hidden for stack in stacks(trees.cfg, trees.params, batch))
    # The teacher's forward is one more pass, and so is the forward that remat repeats.
    passes = plan.PASSES + has_teacher + config.remat
    sums = OF_TENSOR * passes * RING * hidden * (tensor - 1) / tensor
    return config.accumulate * (weights + sums) + factors
