"""Parity of ViT, Q-Former and their composition with torch transformers, on small random models of the real classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, LlamaConfig

from sparselora_jax import rules
from sparselora_jax.models import blip2, llama, qformer, vit

CFG = blip2.Blip2Config(
    vision=vit.ViTConfig(image_size=16, patch_size=4, width=24, depth=3, heads=4, mlp_width=40),
    qformer=qformer.QFormerConfig(queries=5, width=16, pairs=2, heads=2, mlp_width=28, image_width=24),
    language=llama.LlamaConfig(vocab=40, width=20, depth=2, heads=5, kv_heads=1, mlp_width=36),
)
IMAGE_TOKEN = 39


@pytest.fixture(scope='module')
def oracle():
    v, q, t = CFG.vision, CFG.qformer, CFG.language
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=v.width,
            intermediate_size=v.mlp_width,
            num_hidden_layers=v.depth,
            num_attention_heads=v.heads,
            image_size=v.image_size,
            patch_size=v.patch_size,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            hidden_size=q.width,
            num_hidden_layers=2 * q.pairs,
            num_attention_heads=q.heads,
            intermediate_size=q.mlp_width,
            encoder_hidden_size=v.width,
        ).to_dict(),
        text_config=LlamaConfig(
            vocab_size=t.vocab,
            hidden_size=t.width,
            num_hidden_layers=t.depth,
            num_attention_heads=t.heads,
            num_key_value_heads=t.kv_heads,
            intermediate_size=t.mlp_width,
            rms_norm_eps=t.norm_eps,
            tie_word_embeddings=False,
        ).to_dict(),
        num_query_tokens=q.queries,
        image_token_index=IMAGE_TOKEN,
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases, scales and query tokens start at 0 and 1: too easy
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope='module')
def params(oracle):
    """The oracle's weights in our tree."""
    state = {name: value.detach().numpy() for name, value in oracle.state_dict().items()}
    name = next(key for key in state if key.endswith('class_embedding'))
    root = name[: name.index('vision_model')]
    flat = {}

    def put(path, names, transform=lambda w: w):
        """`names`: one source, or one a layer (then stacked)."""
        read = [transform(state[root + n] if root + n in state else state[n]) for n in np.atleast_1d(names)]
        flat[path] = read[0] if isinstance(names, str) else np.stack(read)

    def norm(path, names):
        put(f'{path}/scale', np.char.add(names, '.weight') if not isinstance(names, str) else f'{names}.weight')
        put(f'{path}/bias', np.char.add(names, '.bias') if not isinstance(names, str) else f'{names}.bias')

    def dense(path, names, rows=slice(None)):
        many = not isinstance(names, str)
        put(f'{path}/kernel', np.char.add(names, '.weight') if many else f'{names}.weight', lambda w: w[rows].T)
        put(f'{path}/bias', np.char.add(names, '.bias') if many else f'{names}.bias', lambda b: b[rows])

    v, q = CFG.vision, CFG.qformer
    patch = f'{root}vision_model.embeddings.patch_embedding'
    flat['vision/patch/kernel'] = state[f'{patch}.weight'].transpose(2, 3, 1, 0).reshape(-1, v.width)
    flat['vision/patch/bias'] = state[f'{patch}.bias']
    put('vision/cls', 'vision_model.embeddings.class_embedding')
    put('vision/positions', 'vision_model.embeddings.position_embedding')
    norm('vision/norm', 'vision_model.post_layernorm')
    layers = [f'vision_model.encoder.layers.{i}' for i in range(v.depth)]
    for index, ours in enumerate('qkv'):
        rows = slice(index * v.width, (index + 1) * v.width)
        dense(f'vision/blocks/attn/{ours}', np.char.add(layers, '.self_attn.qkv'), rows)
    dense('vision/blocks/attn/o', np.char.add(layers, '.self_attn.projection'))
    for ours, theirs in {'norm1': 'layer_norm1', 'norm2': 'layer_norm2'}.items():
        norm(f'vision/blocks/{ours}', np.char.add(layers, f'.{theirs}'))
    for ours in ('fc1', 'fc2'):
        dense(f'vision/blocks/mlp/{ours}', np.char.add(layers, f'.mlp.{ours}'))

    put('qformer/queries', 'query_tokens')
    norm('qformer/norm', 'qformer.layernorm')
    for offset, half in enumerate(('first', 'second')):
        layers = [f'qformer.encoder.layer.{2 * pair + offset}' for pair in range(q.pairs)]
        kinds = {'self': 'attention', 'cross': 'crossattention'} if half == 'first' else {'self': 'attention'}
        for ours, theirs in kinds.items():
            path = f'qformer/blocks/{half}/{ours}'
            for letter, word in {'q': 'query', 'k': 'key', 'v': 'value'}.items():
                dense(f'{path}/{letter}', np.char.add(layers, f'.{theirs}.attention.{word}'))
            dense(f'{path}/o', np.char.add(layers, f'.{theirs}.output.dense'))
            norm(f'{path}/norm', np.char.add(layers, f'.{theirs}.output.LayerNorm'))
        dense(f'qformer/blocks/{half}/mlp/fc1', np.char.add(layers, '.intermediate_query.dense'))
        dense(f'qformer/blocks/{half}/mlp/fc2', np.char.add(layers, '.output_query.dense'))
        norm(f'qformer/blocks/{half}/mlp/norm', np.char.add(layers, '.output_query.LayerNorm'))
    dense('projection', 'language_projection')

    text = next(key for key in state if key.endswith('embed_tokens.weight')).removesuffix('embed_tokens.weight')
    flat['language/embed'] = state[f'{text}embed_tokens.weight']
    flat['language/norm/scale'] = state[f'{text}norm.weight']
    flat['language/head/kernel'] = next(w for n, w in state.items() if n.endswith('lm_head.weight')).T
    layers = range(CFG.language.depth)

    def language(path, theirs):
        flat[f'language/blocks/{path}'] = np.stack([state[f'{text}layers.{i}.{theirs}.weight'].T for i in layers])

    for letter in 'qkvo':
        language(f'attn/{letter}/kernel', f'self_attn.{letter}_proj')
    for ours in ('gate', 'up', 'down'):
        language(f'mlp/{ours}/kernel', f'mlp.{ours}_proj')
    language('norm1/scale', 'input_layernorm')
    language('norm2/scale', 'post_attention_layernorm')
    return rules.unflatten({path: jnp.asarray(array) for path, array in flat.items()})


def pixels():
    return np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)


def test_shapes_name_every_parameter(params):
    have = jax.tree.map(lambda leaf: tuple(leaf.shape), params)
    want = blip2.bridge_shapes(CFG) | {'language': llama.shapes(CFG.language, tied=False)}
    assert rules.flatten(have) == rules.flatten(want)


def test_vision_equals_torch(oracle, params):
    tower = getattr(oracle, 'vision_model', None) or oracle.model.vision_model
    with torch.no_grad():
        want = tower(torch.asarray(pixels().transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    got = vit.forward(params['vision'], CFG.vision, jnp.asarray(pixels()))
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_qformer_equals_torch(oracle, params):
    inner = oracle if hasattr(oracle, 'qformer') else oracle.model
    image = np.random.default_rng(1).normal(size=(3, 17, 24)).astype(np.float32)
    with torch.no_grad():
        queries = inner.query_tokens.expand(3, -1, -1)
        want = inner.qformer(query_embeds=queries, encoder_hidden_states=torch.asarray(image))[0].numpy()
    got = qformer.forward(params['qformer'], CFG.qformer, jnp.asarray(image))
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_logits_of_the_whole_model_equal_torch(oracle, params):
    text = np.random.default_rng(2).integers(0, 38, (3, 6))
    ids = np.concatenate([np.full((3, CFG.qformer.queries), IMAGE_TOKEN), text], axis=1)
    with torch.no_grad():
        images = torch.asarray(pixels().transpose(0, 3, 1, 2))
        ones = torch.ones(ids.shape, dtype=torch.long)
        want = oracle(pixel_values=images, input_ids=torch.asarray(ids), attention_mask=ones).logits.numpy()[:, -6:]
    batch = {'image': jnp.asarray(pixels()), 'tokens': jnp.asarray(text, jnp.int32), 'valid': jnp.ones((3, 6), bool)}
    got = blip2.head(params, blip2.forward(params, CFG, batch))
    np.testing.assert_allclose(got, want, atol=1e-3)
