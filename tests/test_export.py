"""What is exported is what others read: the same logits and zeros in torch; what is damaged or misshapen is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparselora_jax as sl
from sparselora_jax import export, rules
from sparselora_jax.data.pipeline import TextFormat
from sparselora_jax.models import blip2, llama, qformer, vit

LANGUAGE = llama.LlamaConfig(
    vocab=48, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24, rope_base=500.0, norm_eps=1e-3, max_positions=64
)
CFG = blip2.Blip2Config(
    vision=vit.ViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2, mlp_width=12),
    qformer=qformer.QFormerConfig(queries=2, width=8, pairs=1, heads=2, mlp_width=12, image_width=8),
    language=LANGUAGE,
)
HF_NAMES = {f'attn/{letter}': f'self_attn.{letter}_proj' for letter in 'qkvo'} | {
    f'mlp/{name}': f'mlp.{name}_proj' for name in ('gate', 'up', 'down')
}


@pytest.fixture(scope='module')
def sparse_language(random_params):
    """`sparse_language(tied, dtype)`: (params with zeros in place, masks)."""

    def make(tied=True, dtype=jnp.float32):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(llama.shapes(LANGUAGE, tied), std=0.5))
        return sl.prune_tree(params, None, [('blocks/.*', '2:4'), ('.*', 'dense')], method=sl.Magnitude())

    return make


def logits(params, tokens):
    x = llama.embed_tokens(params, tokens)
    return llama.head(params, llama.forward(params, LANGUAGE, x, jnp.ones(tokens.shape, bool)))


def load_in_torch(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    problems = {name: list(keys) for name, keys in info.items() if keys}
    assert not problems
    return model.eval()


@pytest.mark.parametrize('tied', [True, False])
def test_torch_reads_the_same_logits_and_zeros(tmp_path, sparse_language, tied):
    params, masks = sparse_language(tied)
    export.save_llama(tmp_path, LANGUAGE, params)
    model = load_in_torch(tmp_path)
    tokens = np.random.default_rng(0).integers(0, LANGUAGE.vocab, (3, 20))
    with torch.no_grad():
        want = model(torch.asarray(tokens)).logits.numpy()
    assert np.abs(want).max() > 1  # logits near zero would agree whatever the weights
    np.testing.assert_allclose(logits(params, jnp.asarray(tokens, jnp.int32)), want, atol=1e-4)
    assert model.config.tie_word_embeddings == tied
    state = model.state_dict()
    for ours, theirs in HF_NAMES.items():
        mask = rules.flatten(masks)[f'blocks/{ours}/kernel']
        for layer in range(LANGUAGE.depth):
            weight = state[f'model.layers.{layer}.{theirs}.weight'].numpy()
            np.testing.assert_array_equal(weight.T != 0, mask[layer])


def test_half_precision_arrives_as_half_precision(tmp_path, sparse_language):
    params, _ = sparse_language(dtype=jnp.bfloat16)
    export.save_llama(tmp_path, LANGUAGE, params)
    model = load_in_torch(tmp_path)
    embed = model.get_input_embeddings().weight
    assert embed.dtype == torch.bfloat16
    np.testing.assert_array_equal(embed.detach().float().numpy(), params['embed'].astype(jnp.float32))


def test_the_tokenizer_lies_beside_the_model(tmp_path, sparse_language, tokenizer):
    params, _ = sparse_language()
    export.save_llama(tmp_path, LANGUAGE, params, tokenizer)
    text = 'Question: what color is the circle? Short answer: teal'
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)['input_ids'] == tokenizer(text)['input_ids']
    assert again.eos_token_id == load_in_torch(tmp_path).generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.fixture(scope='module')
def whole_model(random_params):
    return random_params(blip2.shapes(CFG))


@pytest.mark.parametrize('tied', [True, False])
def test_a_whole_model_comes_back_bit_for_bit(tmp_path, sparse_language, whole_model, tied):
    params = whole_model | {'language': sparse_language(tied, jnp.bfloat16)[0]}
    export.save_model(tmp_path / 'model.safetensors', CFG, params)
    cfg, back = export.load_model(tmp_path / 'model.safetensors')
    assert cfg == CFG
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and jnp.array_equal(a, b), back, params))


def test_a_missing_or_truncated_model_is_named(tmp_path, whole_model):
    path = tmp_path / 'model.safetensors'
    with pytest.raises(sl.StorageError, match='model.safetensors: no such file'):
        export.load_model(path)
    export.save_model(path, CFG, whole_model)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(sl.StorageError, match='model.safetensors: not a complete safetensors file'):
            export.load_model(path)


@pytest.mark.parametrize('config', [None, 'not json', '{"vision": {}}', '[]', '{"vision": 1, "qformer": 2}'])
def test_a_file_without_the_config_of_a_model_is_named(tmp_path, whole_model, config):
    path = tmp_path / 'model.safetensors'
    sl.save_safetensors(path, whole_model, metadata={} if config is None else {'config': config})
    for load in (export.load_model, export.load_text_format):
        with pytest.raises(sl.StorageError, match='model.safetensors: the header holds no config'):
            load(path)


def test_a_model_keeps_how_its_questions_are_written(tmp_path, whole_model):
    path, text = tmp_path / 'model.safetensors', TextFormat(prompt='Q: {} A:', prompt_tokens=9, answer_tokens=2)
    export.save_model(path, CFG, whole_model, text)
    assert export.load_text_format(path) == text
    export.save_model(path, CFG, whole_model)
    assert export.load_text_format(path) == TextFormat()


def misshapen(flat):
    flat['vision/patch/kernel'] = flat['vision/patch/kernel'][:, 1:]
    return 'vision/patch/kernel'


def lacking(flat):
    del flat['language/norm/scale']
    return 'language/norm/scale'


def extra(flat):
    flat['language/extra/kernel'] = jnp.ones((2, 2))
    return 'language/extra/kernel'


@pytest.mark.parametrize('damage', [misshapen, lacking, extra])
def test_a_parameter_that_does_not_fit_the_config_is_named(tmp_path, whole_model, damage):
    flat = rules.flatten(whole_model)
    path = damage(flat)
    export.save_model(tmp_path / 'model.safetensors', CFG, rules.unflatten(flat))
    with pytest.raises(sl.StorageError, match=f'model.safetensors: {path} (is missing|has shape)'):
        export.load_model(tmp_path / 'model.safetensors')
