"""Estimate the disk space that a run takes, from shapes alone."""

from sparselora_jax.planning.memory import FLOAT, Recipe
from sparselora_jax.planning.tracing import nbytes
from sparselora_jax.recipe import edited_kernels, reads_teacher, rounded_rules
from sparselora_jax.sparse import rules

CHECKPOINTS = 3  # on the disk at the same time: the two newest, and the one that is being written


def prune(trees: Recipe) -> dict[str, int]:
    """Return the bytes of what pruning writes, by name.

    Args:
      trees: trees of the recipe.
    """
    flat = rules.flatten(trees.params)
    edited = edited_kernels(trees.config, trees.densities)
    sizes = {'masks': nbytes(trees.masks), 'edited kernels': sum(nbytes(flat[path]) for path in edited)}
    sizes['pruned model'] = nbytes(trees.params)
    return sizes


def train(trees: Recipe) -> dict[str, int]:
    """Return the bytes of what the whole main job writes, by name; its pruned model is only written if it is streamed.

    Args:
      trees: trees of the recipe.
    """
    restore = trees.config.restore
    sizes = prune(trees)
    if not trees.config.stream:
        del sizes['pruned model']
    trained = nbytes(trees.lora)
    if restore.trained == 'weights':
        trained = FLOAT * nbytes(trees.masks)  # a mask has one byte for each weight
    sizes['trained parameters'] = trained
    sizes['checkpoints'] = 3 * CHECKPOINTS * trained  # with both moments of Adam
    if reads_teacher(trees.config):
        # A token and its logit, of four bytes each.
        kept = restore.steps * restore.batch * trees.config.text.answer_tokens * restore.top_k
        sizes["the teacher's tokens"] = 2 * FLOAT * kept
    if rounded_rules(trees.config):
        sizes['rounded kernels'] = FLOAT * nbytes(trees.masks)
    sizes['exported model'] = nbytes(trees.params)
    return sizes
