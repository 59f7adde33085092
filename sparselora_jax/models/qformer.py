"""Q-Former of BLIP-2 (arXiv 2301.12597): learned queries in a BERT that attends to the image in every other layer.

The stacked unit is a *pair* of layers: the first attends to the image, the second does not. InstructBLIP's Q-Former
(arXiv 2305.06500) reads the instruction too: queries and text attend to each other, and each has its own MLP. So does
that of BLIP-2's first training stage, which compares images with texts; it also reads images and texts alone.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.models import key_table, layers
from sparselora_jax.models.config import HfConfig
from sparselora_jax.models.key_table import Keys
from sparselora_jax.models.runners import Runner, scan_blocks
from sparselora_jax.runtime.errors import BatchError, UnsupportedModelError


@dataclass(frozen=True)
class QFormerConfig:
    """The sizes of a Q-Former.

    Attributes:
      queries: number of learned queries, which is also the number of soft words of an image.
      width: size of a hidden state.
      pairs: number of pairs of layers.
      heads: number of attention heads.
      mlp_width: size of a hidden state within an MLP.
      image_width: size of the vision tower's hidden states.
      norm_eps: epsilon of the norms.
      activation: activation of the MLPs, a name in `layers.ACTIVATIONS`.
      vocab: vocabulary size of the text, such as an instruction; 0: the Q-Former reads no text.
      max_positions: maximum number of tokens in a text.
    """

    queries: int
    width: int
    pairs: int
    heads: int
    mlp_width: int
    image_width: int
    norm_eps: float = 1e-12
    activation: str = 'gelu'
    vocab: int = 0
    max_positions: int = 0


def embed(
    w: dict, cfg: QFormerConfig, image: Float[Array, '#batch patches image_dim'], batch: dict
) -> tuple[Float[Array, 'batch rows dim'], dict]:
    """Return the learned queries for each image, followed by the instruction's embeddings if there is one.

    Args:
      w: params of the Q-Former.
      cfg: its config.
      image: the vision tower's output; one image may serve all texts.
      batch: `qformer_input_ids` and `qformer_attention_mask`, if `cfg.vocab` is not 0.

    Returns:
      The blocks' input, and their `ctx`.

    Raises:
      BatchError: the instruction is missing or too long.
    """
    ctx = {'cross': image}
    # The same learned queries are used for every image.
    if not cfg.vocab:
        x = jnp.broadcast_to(w['queries'], (image.shape[0], *w['queries'].shape[1:]))
        return layers.layer_norm(w['norm'], x, cfg.norm_eps).astype(image.dtype), ctx
    tokens = batch.get('qformer_input_ids')
    if tokens is None or tokens.shape[1] > cfg.max_positions:
        have = 'are absent' if tokens is None else f'have {tokens.shape[1]} columns'
        raise BatchError(f'qformer_input_ids {have}: the Q-Former reads an instruction of 1 to {cfg.max_positions}')
    rows = tokens.shape[0]
    x = jnp.broadcast_to(w['queries'], (rows, *w['queries'].shape[1:]))
    # Text has positions. Queries have none, since they are a set.
    x = jnp.concatenate([x, _embed_text(w, tokens)], axis=1)
    mask = batch.get('qformer_attention_mask')
    text = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
    queries = jnp.ones((rows, cfg.queries), bool)
    valid = jnp.concatenate([queries, text], axis=1)  # in the order of x
    # Calibration needs the rows that each kernel reads, see `runners.valid_rows`.
    ctx |= {'mask': valid[:, None], 'valid': valid, 'query_valid': queries, 'text_valid': text}
    # BERT normalises its embeddings. The blocks run in the dtype of the vision tower's output.
    return layers.layer_norm(w['norm'], x, cfg.norm_eps).astype(image.dtype), ctx


def _embed_text(w: dict, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch tokens dim']:
    return w['embed'][tokens] + w['positions'][None, : tokens.shape[1]]


def _attention(
    w: dict,
    cfg: QFormerConfig,
    x: Float[Array, 'batch rows dim'],
    source: Float[Array, '#batch sources source_dim'],
    mask: Bool[Array, 'batch 1 sources'] | None = None,
) -> Float[Array, 'batch rows dim']:
    """Return `x` after attention to `source`, the residual sum and its norm."""
    q = layers.split_heads(layers.dense(w['q'], x), cfg.heads)
    # Computed once for an image that several texts share, and only then repeated.
    k, v = (layers.split_heads(layers.dense(w[name], source), cfg.heads) for name in 'kv')
    k, v = (jnp.broadcast_to(heads, (q.shape[0], *heads.shape[1:])) for heads in (k, v))
    return layers.layer_norm(w['norm'], x + layers.dense(w['o'], layers.attend(q, k, v, mask)), cfg.norm_eps)


def _mlp(w: dict, cfg: QFormerConfig, x: Float[Array, 'batch rows dim']) -> Float[Array, 'batch rows dim']:
    h = layers.ACTIVATIONS[cfg.activation](layers.dense(w['fc1'], x))
    return layers.layer_norm(w['norm'], x + layers.dense(w['fc2'], h), cfg.norm_eps)


def _layer(w: dict, cfg: QFormerConfig, x: Float[Array, 'batch rows dim'], ctx: dict) -> Float[Array, 'batch rows dim']:
    x = _attention(w['self'], cfg, x, x, ctx.get('mask'))
    # Queries and text attend to each other, and are then split. Only queries attend to the image, and each has its MLP.
    queries = x[:, : cfg.queries]
    text = x[:, cfg.queries :]
    if 'cross' in w:  # the first layer of a pair
        queries = _attention(w['cross'], cfg, queries, ctx['cross'])
    queries = _mlp(w['mlp'], cfg, queries)
    if not cfg.vocab:
        return queries
    # The text output of the last layer is unused. Its MLP still runs, since checkpoints contain it and all layers are
    # stacked.
    return jnp.concatenate([queries, _mlp(w['text_mlp'], cfg, text)], axis=1)


def block(
    w: dict, cfg: QFormerConfig, x: Float[Array, 'batch rows dim'], ctx: dict, cache: None
) -> tuple[Float[Array, 'batch rows dim'], None]:
    """Run a pair of post-norm layers: self-attention, cross-attention to the image, MLP; then self-attention, MLP.

    Args:
      w: weights of one pair.
      cfg: the Q-Former's config.
      x: queries, followed by text.
      ctx: the `ctx` from `embed`.
      cache: None, since this tower does not decode token by token.

    Returns:
      The new `x` and the cache.
    """
    x = _layer(w['first'], cfg, x, ctx)
    return _layer(w['second'], cfg, x, ctx), cache


def finish(w: dict, cfg: QFormerConfig, x: Float[Array, 'batch rows dim']) -> Float[Array, 'batch queries dim']:
    """Return only the queries; there is no final norm, since every layer ends with a norm.

    Args:
      w: params of the Q-Former.
      cfg: its config.
      x: the last pair's output.
    """
    del w
    return x[:, : cfg.queries]


def forward(
    w: dict, cfg: QFormerConfig, image: Float[Array, '#batch patches image_dim'], batch: dict, run: Runner = scan_blocks
) -> Float[Array, 'batch queries dim']:
    """Return the queries' hidden states, given the image (and the instruction, if `cfg.vocab` is not 0).

    Args:
      w: params of the Q-Former, or its weights from `bind`.
      cfg: its config.
      image: the vision tower's output.
      batch: contains the instruction.
      run: executes the pairs.

    Raises:
      BatchError: see `embed`.
    """
    x, ctx = embed(w, cfg, image, batch)
    x, _ = run('qformer', lambda w, x, ctx, cache: block(w, cfg, x, ctx, cache), w['blocks'], x, ctx)
    return finish(w, cfg, x)


def forward_image(
    w: dict, cfg: QFormerConfig, image: Float[Array, 'batch patches image_dim'], run: Runner = scan_blocks
) -> Float[Array, 'batch queries dim']:
    """Return the queries' hidden states, given the image alone: a text, if the Q-Former reads any, is left out.

    Args:
      w: params of the Q-Former, or its weights from `bind`.
      cfg: its config.
      image: the vision tower's output.
      run: executes the pairs.
    """
    return forward(w, replace(cfg, vocab=0), image, {}, run)


def forward_text(
    w: dict,
    cfg: QFormerConfig,
    tokens: Int[Array, 'batch tokens'],
    valid: Bool[Array, 'batch tokens'],
    run: Runner = scan_blocks,
) -> Float[Array, 'batch tokens dim']:
    """Return the text's hidden states, given the text alone: there are no queries and no image, as in a BERT.

    Args:
      w: params of the Q-Former, or its weights from `bind`.
      cfg: its config; `cfg.vocab` is not 0.
      tokens: the text.
      valid: False marks a pad.
      run: executes the pairs.

    Raises:
      BatchError: the text is too long.
    """
    if tokens.shape[1] > cfg.max_positions:
        raise BatchError(f'a text of {tokens.shape[1]} tokens: the Q-Former reads 1 to {cfg.max_positions}')
    x = layers.layer_norm(w['norm'], _embed_text(w, tokens), cfg.norm_eps)
    ctx = {'mask': valid[:, None], 'valid': valid}
    x, _ = run('qformer', lambda w, x, ctx, cache: text_block(w, cfg, x, ctx, cache), w['blocks'], x, ctx)
    return x


def text_block(
    w: dict, cfg: QFormerConfig, x: Float[Array, 'batch rows dim'], ctx: dict, cache: None
) -> tuple[Float[Array, 'batch rows dim'], None]:
    """Run a pair of layers on text alone: self-attention and the MLP of the text, twice.

    Args:
      w: weights of one pair.
      cfg: the Q-Former's config.
      x: the text.
      ctx: `mask`, False at pads.
      cache: None, since this tower does not decode token by token.

    Returns:
      The new `x` and the cache.
    """
    for name in ('first', 'second'):
        x = _attention(w[name]['self'], cfg, x, x, ctx['mask'])
        x = _mlp(w[name]['text_mlp'], cfg, x)
    return x, cache


def shapes(cfg: QFormerConfig) -> dict:
    """Return the shape of every parameter, as a params tree of tuples.

    Args:
      cfg: the Q-Former's config.
    """
    pairs = cfg.pairs
    width = cfg.width
    norm = {'scale': (pairs, width), 'bias': (pairs, width)}

    def dense(inputs: int, outputs: int) -> dict:
        return {'kernel': (pairs, inputs, outputs), 'bias': (pairs, outputs)}

    def attention(source_width: int) -> dict:
        return {
            'q': dense(width, width),
            'k': dense(source_width, width),
            'v': dense(source_width, width),
            'o': dense(width, width),
            'norm': norm,
        }

    # Every group ends with a norm of the residual sum, as in BERT.
    mlp = {'fc1': dense(width, cfg.mlp_width), 'fc2': dense(cfg.mlp_width, width), 'norm': norm}
    layer = {'self': attention(width), 'mlp': mlp}
    tree = {
        'queries': (1, cfg.queries, width),
        'norm': {'scale': (width,), 'bias': (width,)},
    }
    if cfg.vocab:
        layer['text_mlp'] = mlp
        tree['embed'] = (cfg.vocab, width)
        tree['positions'] = (cfg.max_positions, width)
    return tree | {'blocks': {'first': layer | {'cross': attention(cfg.image_width)}, 'second': layer}}


def keys(cfg: QFormerConfig) -> Keys:
    """Return the key table: our paths -> parameter names in transformers' BLIP-2 or InstructBLIP model.

    The names are those of the whole model, since the queries are outside its Q-Former module.

    Args:
      cfg: the Q-Former's config.
    """
    table: Keys = {'queries': 'query_tokens'}
    if cfg.vocab:
        table['embed'] = 'qformer.embeddings.word_embeddings.weight'
        table['positions'] = 'qformer.embeddings.position_embeddings.weight'
        table |= key_table.norm('norm', 'qformer.embeddings.layernorm')
    else:
        table |= key_table.norm('norm', 'qformer.layernorm')
    # Layers 0, 2, 4, ... attend to the image; layers 1, 3, 5, ... do not.
    first = _layer_keys(cfg) | _attention_keys('cross', 'crossattention')
    table |= key_table.nested(first, 'blocks/first/', 'qformer.encoder.layer.{even}.')
    table |= key_table.nested(_layer_keys(cfg), 'blocks/second/', 'qformer.encoder.layer.{odd}.')
    return table


def _layer_keys(cfg: QFormerConfig) -> Keys:
    """Return the key table that both layers of a pair share."""
    # transformers calls the MLP of the queries `intermediate_query` and that of the text `intermediate`.
    table = _attention_keys('self', 'attention') | _mlp_keys('mlp', '_query')
    if cfg.vocab:
        table |= _mlp_keys('text_mlp', '')
    return table


def _attention_keys(ours: str, theirs: str) -> Keys:
    table = key_table.dense(f'{ours}/o', f'{theirs}.output.dense')
    table |= key_table.norm(f'{ours}/norm', f'{theirs}.output.LayerNorm')
    for letter, word in {'q': 'query', 'k': 'key', 'v': 'value'}.items():
        table |= key_table.dense(f'{ours}/{letter}', f'{theirs}.attention.{word}')
    return table


def _mlp_keys(ours: str, suffix: str) -> Keys:
    table = key_table.dense(f'{ours}/fc1', f'intermediate{suffix}.dense')
    table |= key_table.dense(f'{ours}/fc2', f'output{suffix}.dense')
    return table | key_table.norm(f'{ours}/norm', f'output{suffix}.LayerNorm')


def from_hf(hf: HfConfig, queries: int, *, compares_texts: bool = False) -> QFormerConfig:
    """Convert a transformers `Blip2QFormerConfig` or `InstructBlipQFormerConfig`.

    Args:
      hf: the transformers config of the Q-Former.
      queries: `num_query_tokens` of the whole model's config.
      compares_texts: whether it is that of a retrieval model, which reads texts.

    Returns:
      Our config.

    Raises:
      UnsupportedModelError: a field's value is not supported; names the field.
    """
    if hf.cross_attention_frequency != 2 or hf.num_hidden_layers % 2:
        raise UnsupportedModelError(
            f'cross_attention_frequency {hf.cross_attention_frequency}, num_hidden_layers {hf.num_hidden_layers} of '
            f'{hf.model_type}: expected 2 and an even number'
        )
    if getattr(hf, 'position_embedding_type', 'absolute') != 'absolute':
        raise UnsupportedModelError(f"position_embedding_type {hf.position_embedding_type!r}: expected 'absolute'")
    if getattr(hf, 'use_qformer_text_input', False) and not compares_texts:
        raise UnsupportedModelError(f'use_qformer_text_input of {hf.model_type}: only retrieval models read text there')
    # BLIP-2's config has a vocabulary too, but its Q-Former does not use it, unless it compares texts with images.
    reads_text = compares_texts or hf.model_type == 'instructblip_qformer'
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
