"""Losses of the training stages of the embedded small VLM: a small version of BLIP-2's recipe (arXiv 2301.12597).

If the bridge to a frozen language model is trained end to end, it learns only the most frequent answers and ignores the
image. So training has stages. In `facts` the vision encoder learns to name colour and shape. In `words` each projected
query learns the embedding of one word of a caption. In `answers` the loss goes through the language model, which may
also train LoRA.
"""

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int
from transformers import PreTrainedTokenizerBase

from sparselora_jax.checkpoints import embedded
from sparselora_jax.data import easy_vqa
from sparselora_jax.models import blip2, layers, vit
from sparselora_jax.models.init import init_params
from sparselora_jax.models.model import Model
from sparselora_jax.sparse.weights import bind

HEADS = ('colour', 'shape')  # in the order of `batch['facts']`


def facts_shapes(cfg: blip2.Blip2Config) -> dict:
    """Return the shapes of two linear heads on the class token, which only the first stage uses.

    Args:
      cfg: config of the model.
    """
    outputs = {'colour': len(easy_vqa.COLOURS), 'shape': len(easy_vqa.SHAPES)}
    return {name: {'kernel': (cfg.vision.width, outputs[name]), 'bias': (outputs[name],)} for name in HEADS}


def facts_loss(trained: dict, frozen: None, batch: dict, *, cfg: blip2.Blip2Config) -> tuple[Array, dict]:
    """Return the loss of naming colour and shape from the class token, and metrics.

    Args:
      trained: `vision` and `facts`, the heads.
      frozen: not used.
      batch: `pixel_values`, and `facts` [batch, 2], which is -1 where the questions do not reveal it.
      cfg: config of the model.
    """
    del frozen
    hidden = vit.forward(trained['vision'], cfg.vision, batch['pixel_values'])[:, 0]
    metrics = {}
    for index, name in enumerate(HEADS):
        target = batch['facts'][:, index]
        logits = layers.dense(trained['facts'][name], hidden)
        is_known = target >= 0
        # -1 is not a valid index: an unknown target is replaced by 0, and its loss is left out of the mean.
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(target, 0))
        count = jnp.maximum(jnp.sum(is_known), 1).astype(jnp.float32)
        metrics[name] = jnp.sum(jnp.where(is_known, ce, 0.0)) / count
        is_right = is_known & (jnp.argmax(logits, axis=-1).astype(target.dtype) == target)
        metrics[f'{name}_accuracy'] = jnp.sum(is_right).astype(jnp.float32) / count
    loss = metrics['colour'] + metrics['shape']
    return loss, metrics | {'loss': loss}


def caption_words(
    tokenizer: PreTrainedTokenizerBase, facts: tuple[int, int], queries: int
) -> Int[np.ndarray, ' queries']:
    """Return the target tokens of the queries: a caption, padded with line ends.

    Args:
      tokenizer: tokenizer of the language model.
      facts: indices of the colour and the shape, both known.
      queries: number of tokens.
    """
    colour, shape = facts
    caption = f'This image shows a {easy_vqa.COLOURS[colour]} {easy_vqa.SHAPES[shape]}.'
    words = tokenizer(caption)['input_ids']
    (line_end,) = tokenizer('\n')['input_ids']
    return np.asarray(words + [line_end] * (queries - len(words)), np.int32)


def words_loss(trained: dict, frozen: dict, batch: dict, *, cfg: blip2.Blip2Config) -> tuple[Array, dict]:
    """Return the loss between projected query k and the embedding of caption word k, and metrics.

    Args:
      trained: the bridge.
      frozen: `vision` and `language`.
      batch: `pixel_values`, and `words` [batch, queries].
      cfg: config of the model.
    """
    image = vit.forward(frozen['vision'], cfg.vision, batch['pixel_values'])
    soft = blip2.bridge(trained, cfg, image, batch)
    table = frozen['language']['embed']
    # |s - t|^2 = |s|^2 - 2 s.t + |t|^2 avoids an array of shape [batch, queries, vocab, width].
    squared = (
        jnp.sum(soft**2, axis=-1, keepdims=True)
        - 2 * jnp.einsum('bqd,vd->bqv', soft, table)
        + jnp.sum(table**2, axis=-1)[None, None]
    )
    # Cross-entropy makes the right word the nearest; regression makes it near, on the scale of the table's spread.
    ce = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(-squared, batch['words']))
    regression = jnp.mean((soft - table[batch['words']]) ** 2) / jnp.var(table)
    is_nearest = jnp.argmin(squared, axis=-1).astype(jnp.int32) == batch['words']
    loss = ce + regression
    metrics = {'ce': ce, 'regression': regression, 'nearest': jnp.mean(is_nearest.astype(jnp.float32))}
    return loss, metrics | {'loss': loss}


def answers_loss(trained: dict, frozen: dict, batch: dict, *, cfg: blip2.Blip2Config) -> tuple[Array, dict]:
    """Return the cross-entropy of the answer through the language model, and metrics.

    Args:
      trained: the bridge; with `lora`, factors of the language model.
      frozen: the other params.
      batch: see `Model.answer_logits`; with `targets` and `answer`, True at the tokens of the answer.
      cfg: config of the model.
    """
    # LoRA factors are not part of the params; `bind` combines both where the model reads a weight.
    params = frozen | {name: tree for name, tree in trained.items() if name != 'lora'}
    logits = Model(cfg, embedded.GENERATION).answer_logits(bind(params, lora=trained.get('lora')), batch)
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, batch['targets'])
    answer = batch['answer']
    loss = jnp.sum(jnp.where(answer, ce, 0.0)) / jnp.maximum(jnp.sum(answer), 1).astype(jnp.float32)
    # An answer is right if all its tokens are; positions outside the answer count as right.
    is_right = jnp.all((jnp.argmax(logits, axis=-1).astype(jnp.int32) == batch['targets']) | ~answer, axis=-1)
    return loss, {'loss': loss, 'accuracy': jnp.mean(is_right.astype(jnp.float32))}


def init(key: Array, cfg: blip2.Blip2Config) -> dict:
    """Return the bridge and the heads of the first stage, untrained.

    Args:
      key: key of the random numbers.
      cfg: config of the model.
    """
    return init_params(key, blip2.bridge_shapes(cfg) | {'facts': facts_shapes(cfg)})
