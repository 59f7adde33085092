"""How the embedded small VLM was made: BLIP-2's recipe in small (arXiv 2301.12597), each stage a loss.

A bridge into a frozen language model that is trained end to end settles on the question prior and stays blind, so the
image is made readable first: `facts` (the vision encoder names colour and shape), `words` (each projected query is the
embedding of one word of a caption), and then `answers` (through the language model, which may train by LoRA too).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from sparselora_jax.checkpoints import embedded
from sparselora_jax.data import easy_vqa
from sparselora_jax.models import blip2, layers, vit
from sparselora_jax.models.init import init_params
from sparselora_jax.models.model import Model
from sparselora_jax.sparse.weights import bind


def facts_shapes(cfg: blip2.Blip2Config) -> dict:
    """Two linear heads on the class token, used by the first stage only."""
    heads = {'colour': len(easy_vqa.COLOURS), 'shape': len(easy_vqa.SHAPES)}
    return {name: {'kernel': (cfg.vision.width, size), 'bias': (size,)} for name, size in heads.items()}


def facts_loss(trained: dict, frozen: None, batch: dict, *, cfg: blip2.Blip2Config) -> tuple[Array, dict]:
    """Colour and shape from the class token; `batch['facts']` [batch, 2], -1 where the questions don't tell."""
    del frozen
    hidden = vit.forward(trained['vision'], cfg.vision, batch['pixel_values'])[:, 0]
    metrics = {}
    for index, name in enumerate(('colour', 'shape')):
        target = batch['facts'][:, index]
        logits = layers.dense(trained['facts'][name], hidden)
        told = target >= 0
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(target, 0))
        count = jnp.maximum(jnp.sum(told), 1).astype(jnp.float32)
        metrics[name] = jnp.sum(jnp.where(told, ce, 0.0)) / count
        right = told & (jnp.argmax(logits, axis=-1).astype(target.dtype) == target)
        metrics[f'{name}_accuracy'] = jnp.sum(right).astype(jnp.float32) / count
    loss = metrics['colour'] + metrics['shape']
    return loss, metrics | {'loss': loss}


def caption_words(tokenizer: Any, facts: tuple[int, int], queries: int) -> Int[np.ndarray, ' queries']:
    """The words that the queries should read as, filled up with line ends; `facts` must both be told."""
    colour, shape = facts
    caption = f'This image shows a {easy_vqa.COLOURS[colour]} {easy_vqa.SHAPES[shape]}.'
    words = tokenizer(caption)['input_ids']
    (line_end,) = tokenizer('\n')['input_ids']
    return np.asarray(words + [line_end] * (queries - len(words)), np.int32)


def words_loss(trained: dict, frozen: dict, batch: dict, *, cfg: blip2.Blip2Config) -> tuple[Array, dict]:
    """Projected query k -> the embedding of caption word k: cross-entropy over distances, plus regression."""
    image = vit.forward(frozen['vision'], cfg.vision, batch['pixel_values'])
    soft = blip2.bridge(trained, cfg, image, batch)
    table = frozen['language']['embed']
    squared = (
        jnp.sum(soft**2, axis=-1, keepdims=True)
        - 2 * jnp.einsum('bqd,vd->bqv', soft, table)
        + jnp.sum(table**2, axis=-1)[None, None]
    )
    ce = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(-squared, batch['words']))
    regression = jnp.mean((soft - table[batch['words']]) ** 2) / jnp.var(table)
    nearest = jnp.argmin(squared, axis=-1).astype(jnp.int32) == batch['words']
    loss = ce + regression
    metrics = {'ce': ce, 'regression': regression, 'nearest': jnp.mean(nearest.astype(jnp.float32))}
    return loss, metrics | {'loss': loss}


def answers_loss(trained: dict, frozen: dict, batch: dict, *, cfg: blip2.Blip2Config) -> tuple[Array, dict]:
    """Cross-entropy of the answer through the language model; `trained['lora']`, if there, adapts that model."""
    params = frozen | {name: tree for name, tree in trained.items() if name != 'lora'}
    logits = Model(cfg, embedded.GENERATION).answer_logits(bind(params, lora=trained.get('lora')), batch)
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, batch['targets'])
    answer = batch['answer']
    loss = jnp.sum(jnp.where(answer, ce, 0.0)) / jnp.maximum(jnp.sum(answer), 1).astype(jnp.float32)
    right = jnp.all((jnp.argmax(logits, axis=-1).astype(jnp.int32) == batch['targets']) | ~answer, axis=-1)
    return loss, {'loss': loss, 'accuracy': jnp.mean(right.astype(jnp.float32))}


def optimizer(*, steps: int, peak: float, warmup: int, clip: float, weight_decay: float) -> Any:
    """AdamW with warm-up and cosine, gradients clipped at a global norm (20 to 80 otherwise)."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, 0.01 * peak)
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(schedule, weight_decay=weight_decay))


def init(key: Array, cfg: blip2.Blip2Config) -> dict:
    """The bridge and the heads of the first stage, untrained."""
    return init_params(key, blip2.bridge_shapes(cfg) | {'facts': facts_shapes(cfg)})
