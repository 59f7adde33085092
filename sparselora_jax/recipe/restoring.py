"""Build the step of restoration that a recipe asks for."""

from collections.abc import Callable

import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from sparselora_jax.models.model import Model
from sparselora_jax.models.runners import remat_blocks, scan_blocks
from sparselora_jax.restoration import guard
from sparselora_jax.restoration.restore import Frozen, make_train_step, paper_optimizer
from sparselora_jax.restoration.train import State
from sparselora_jax.sparse import sharding


def runs_teacher(config: ConfigDict) -> bool:
    """Return whether restoration runs the dense model beside the student.

    Args:
      config: a recipe.
    """
    return bool(config.restore.kd) and config.restore.teacher == 'model'


def reads_teacher(config: ConfigDict) -> bool:
    """Return whether restoration reads the dense model's logits from files of an earlier stage.

    Args:
      config: a recipe.
    """
    return bool(config.restore.kd) and config.restore.teacher == 'top_k'


def restore_program(
    model: Model, config: ConfigDict, mesh: Mesh | AbstractMesh | None
) -> tuple[Callable[[State, Frozen, dict], tuple[State, dict[str, Array]]], optax.GradientTransformation]:
    """Return the jitted step of restoration and its optimizer for a recipe.

    Args:
      model: the model that is restored.
      config: a recipe.
      mesh: the mesh on which the arguments of the step will lie; None: one device.
    """
    restore = config.restore
    tx = paper_optimizer(
        restore.steps,
        peak=restore.peak,
        warmup=restore.warmup,
        start=restore.start,
        end=restore.end,
        weight_decay=restore.weight_decay,
        clip=restore.clip or None,
    )
    # Only the wrapper can recognise a spike, whether the step is then skipped or the run ends.
    if restore.on_bad_step == 'skip' or restore.spike:
        tx = guard.skip_bad_steps(tx, spike=restore.spike or None)
    runner = remat_blocks if restore.remat else scan_blocks
    if mesh is not None:
        runner = sharding.gathering(runner, mesh)

    def forward(weights, batch):
        if mesh is not None:
            # The runner gathers the weights of the blocks, a layer at a time.
            weights = sharding.gather_outside_blocks(weights, mesh)
        return model.answer_logits(weights, batch, runner)

    step = make_train_step(
        forward,
        tx,
        kd=restore.kd,
        temperature=restore.temperature,
        kl_reduction=restore.kl_reduction,
        gradient=restore.gradient,
        accumulate=restore.accumulate,
        trained=restore.trained,
        parts=sharding.row_parts(mesh),
        dropout=config.lora.dropout,
        seed=config.seed,
    )
    return step, tx
