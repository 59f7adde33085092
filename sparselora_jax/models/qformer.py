"""Q-Former of BLIP-2 (arXiv 2301.12597): learned queries through a BERT that reads the image every other layer.

The stacked unit is a *pair* of layers: the first attends to the image, the second does not. InstructBLIP's (arXiv
2305.06500) reads the instruction too: queries and text attend to each other, and each has its own MLP.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparselora_jax.models import keys as names
from sparselora_jax.models import layers
from sparselora_jax.models.runners import scan_blocks
from sparselora_jax.runtime.errors import BatchError, UnsupportedModelError


@dataclass(frozen=True)
class QFormerConfig:
    queries: int
    width: int
    pairs: int  # layers / 2
    heads: int
    mlp_width: int
    image_width: int
    norm_eps: float = 1e-12
    activation: str = 'gelu'
    vocab: int = 0  # of the instruction's tokens; 0: no text is read
    max_positions: int = 0  # tokens of the longest instruction


def embed(
    w: dict, cfg: QFormerConfig, image: Float[Array, 'batch patches image_dim'], batch: dict
) -> tuple[Float[Array, 'batch rows dim'], dict]:
    """The learned queries, one copy an image, and after them the instruction's words if there are any.

    Raises:
      BatchError: no instruction, or one that is too long.
    """
    x = jnp.broadcast_to(w['queries'], (image.shape[0], *w['queries'].shape[1:]))
    ctx = {'cross': image}
    if cfg.vocab:
        tokens = batch.get('qformer_input_ids')
        if tokens is None or tokens.shape[1] > cfg.max_positions:
            have = 'are absent' if tokens is None else f'have {tokens.shape[1]} columns'
            raise BatchError(f'qformer_input_ids {have}: the Q-Former reads an instruction of 1 to {cfg.max_positions}')
        x = jnp.concatenate([x, w['embed'][tokens] + w['positions'][None, : tokens.shape[1]]], axis=1)
        mask = batch.get('qformer_attention_mask')
        text = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
        queries = jnp.ones((image.shape[0], cfg.queries), bool)
        valid = jnp.concatenate([queries, text], axis=1)
        ctx |= {'mask': valid[:, None], 'valid': valid, 'query_valid': queries, 'text_valid': text}
    return layers.layer_norm(w['norm'], x, cfg.norm_eps).astype(image.dtype), ctx


def _attention(w: dict, cfg: QFormerConfig, x: Array, source: Array, mask: Array | None = None) -> Array:
    q = layers.split_heads(layers.dense(w['q'], x), cfg.heads)
    k, v = (layers.split_heads(layers.dense(w[name], source), cfg.heads) for name in 'kv')
    return layers.layer_norm(w['norm'], x + layers.dense(w['o'], layers.attend(q, k, v, mask)), cfg.norm_eps)


def _mlp(w: dict, cfg: QFormerConfig, x: Array) -> Array:
    h = layers.ACTIVATIONS[cfg.activation](layers.dense(w['fc1'], x))
    return layers.layer_norm(w['norm'], x + layers.dense(w['fc2'], h), cfg.norm_eps)


def _layer(w: dict, cfg: QFormerConfig, x: Array, ctx: dict) -> Array:
    x = _attention(w['self'], cfg, x, x, ctx.get('mask'))
    queries, text = x[:, : cfg.queries], x[:, cfg.queries :]
    if 'cross' in w:
        queries = _attention(w['cross'], cfg, queries, ctx['cross'])
    queries = _mlp(w['mlp'], cfg, queries)
    # The last layer's text goes nowhere; its MLP is kept, since checkpoints hold one and all layers are stacked.
    return jnp.concatenate([queries, _mlp(w['text_mlp'], cfg, text)], axis=1) if cfg.vocab else queries


def block(w: dict, cfg: QFormerConfig, x: Float[Array, 'batch rows dim'], ctx: dict, cache: None):
    """A pair: self-attention, cross-attention to the image, MLP; then self-attention, MLP. Norms follow the sums."""
    return _layer(w['second'], cfg, _layer(w['first'], cfg, x, ctx), ctx), cache


def finish(w: dict, cfg: QFormerConfig, x: Float[Array, 'batch rows dim']) -> Float[Array, 'batch queries dim']:
    """The queries alone: every layer ends in its norm."""
    del w
    return x[:, : cfg.queries]


def forward(
    w: dict, cfg: QFormerConfig, image: Float[Array, 'batch patches image_dim'], batch: dict, run=scan_blocks
) -> Float[Array, 'batch queries dim']:
    """Image tokens (and the instruction of `batch`, if `cfg.vocab` says so) -> the queries' hidden states."""
    x, ctx = embed(w, cfg, image, batch)
    x, _ = run('qformer', lambda w, x, ctx, cache: block(w, cfg, x, ctx, cache), w['blocks'], x, ctx)
    return finish(w, cfg, x)


def shapes(cfg: QFormerConfig) -> dict:
    """The shape of every parameter, as a params tree of tuples."""
    n, d, f = cfg.pairs, cfg.width, cfg.mlp_width
    norm = {'scale': (n, d), 'bias': (n, d)}

    def attention(source: int) -> dict:
        kernels = {name: {'kernel': (n, d, d), 'bias': (n, d)} for name in 'qo'}
        return kernels | {name: {'kernel': (n, source, d), 'bias': (n, d)} for name in 'kv'} | {'norm': norm}

    fc1, fc2 = {'kernel': (n, d, f), 'bias': (n, f)}, {'kernel': (n, f, d), 'bias': (n, d)}
    mlp = {'fc1': fc1, 'fc2': fc2, 'norm': norm}
    layer = {'self': attention(d), 'mlp': mlp} | ({'text_mlp': mlp} if cfg.vocab else {})
    words = {'embed': (cfg.vocab, d), 'positions': (cfg.max_positions, d)} if cfg.vocab else {}
    return words | {
        'queries': (1, cfg.queries, d),
        'norm': {'scale': (d,), 'bias': (d,)},
        'blocks': {'first': layer | {'cross': attention(cfg.image_width)}, 'second': layer},
    }


def keys(cfg: QFormerConfig) -> names.Keys:
    """Our path -> transformers' name in BLIP-2's or InstructBLIP's model: the queries lie outside its Q-Former."""
    table = {'queries': 'query_tokens'}
    if cfg.vocab:
        embeddings = 'qformer.embeddings'
        table |= {'embed': f'{embeddings}.word_embeddings.weight'}
        table |= {'positions': f'{embeddings}.position_embeddings.weight'}
        table |= names.norm('norm', f'{embeddings}.layernorm')
    else:
        table |= names.norm('norm', 'qformer.layernorm')
    attentions = {'self': 'attention', 'cross': 'crossattention'}
    mlps = {'mlp': '_query'} | ({'text_mlp': ''} if cfg.vocab else {})
    for half, layer in {'first': '{even}', 'second': '{odd}'}.items():
        block = {}
        for ours, theirs in attentions.items() if half == 'first' else [('self', 'attention')]:
            for letter, word in {'q': 'query', 'k': 'key', 'v': 'value'}.items():
                block |= names.dense(f'{ours}/{letter}', f'{theirs}.attention.{word}')
            block |= names.dense(f'{ours}/o', f'{theirs}.output.dense')
            block |= names.norm(f'{ours}/norm', f'{theirs}.output.LayerNorm')
        for ours, suffix in mlps.items():
            block |= names.dense(f'{ours}/fc1', f'intermediate{suffix}.dense')
            block |= names.dense(f'{ours}/fc2', f'output{suffix}.dense')
            block |= names.norm(f'{ours}/norm', f'output{suffix}.LayerNorm')
        table |= names.nested(block, f'blocks/{half}/', f'qformer.encoder.layer.{layer}.')
    return table


def from_hf(hf: Any, queries: int) -> QFormerConfig:
    """The config of a transformers `Blip2QFormerConfig` or `InstructBlipQFormerConfig`; `queries`: num_query_tokens.

    Raises:
      UnsupportedModelError: names the field whose value is not supported.
    """
    if hf.cross_attention_frequency != 2 or hf.num_hidden_layers % 2:
        found = f'cross_attention_frequency {hf.cross_attention_frequency}, num_hidden_layers {hf.num_hidden_layers}'
        raise UnsupportedModelError(f'{found} of {hf.model_type}: expected 2 and an even number')
    if getattr(hf, 'use_qformer_text_input', False):
        raise UnsupportedModelError(f'use_qformer_text_input of {hf.model_type}: only retrieval models read text there')
    if getattr(hf, 'position_embedding_type', 'absolute') != 'absolute':
        raise UnsupportedModelError(f"position_embedding_type {hf.position_embedding_type!r}: expected 'absolute'")
    reads_text = hf.model_type == 'instructblip_qformer'
    return QFormerConfig(
        queries=queries,
        width=hf.hidden_size,
        pairs=hf.num_hidden_layers // 2,
        heads=hf.num_attention_heads,
        mlp_width=hf.intermediate_size,
        image_width=hf.encoder_hidden_size,
        norm_eps=hf.layer_norm_eps,
        activation=layers.known_activation(hf.hidden_act, hf.model_type),
        vocab=hf.vocab_size if reads_text else 0,
        max_positions=hf.max_position_embeddings if reads_text else 0,
    )
