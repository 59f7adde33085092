"""The stages that make the embedded model: their losses, and the script end to end on a tiny language model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparselora_jax as sl
from sparselora_jax.checkpoints import embedded, gguf
from sparselora_jax.data import easy_vqa
from sparselora_jax.jobs import pretrain
from sparselora_jax.models import blip2, layers, llama, qformer, vit
from sparselora_jax.sparse import rules

CFG = blip2.Blip2Config(
    vision=vit.ViTConfig(image_size=64, patch_size=16, width=16, depth=1, heads=2, mlp_width=32),
    qformer=qformer.QFormerConfig(queries=8, width=16, pairs=1, heads=2, mlp_width=32, image_width=16),
    language=llama.LlamaConfig(vocab=49152, width=16, depth=2, heads=4, kv_heads=2, mlp_width=32),
)


def images(count):
    return jax.random.normal(jax.random.key(1), (count, 3, 64, 64))


@pytest.mark.slow
def test_facts_that_the_questions_do_not_tell_do_not_count():
    params = pretrain.init(jax.random.key(0), CFG)
    facts = np.array([[3, 1], [-1, 2], [5, -1]])
    loss, metrics = pretrain.facts_loss(params, None, {'pixel_values': images(3), 'facts': jnp.asarray(facts)}, cfg=CFG)
    hidden = vit.forward(params['vision'], CFG.vision, images(3))[:, 0]
    for column, name in enumerate(('colour', 'shape')):
        logits = np.asarray(layers.dense(params['facts'][name], hidden), np.float64)
        told = facts[:, column] >= 0
        picked = logits[told, facts[told, column]]
        want = np.mean(np.log(np.exp(logits[told]).sum(axis=1)) - picked)
        np.testing.assert_allclose(metrics[name], want, rtol=1e-5)
    np.testing.assert_allclose(loss, metrics['colour'] + metrics['shape'], rtol=1e-6)


@pytest.mark.slow
def test_a_caption_names_colour_and_shape_and_fills_every_query(tokenizer):
    words = pretrain.caption_words(tokenizer, (4, 1), queries=12)
    assert words.shape == (12,)
    assert tokenizer.decode(words).strip() == 'This image shows a blue circle.'


@pytest.mark.slow
def test_queries_that_are_words_have_no_regression_loss(random_params):
    params = random_params(CFG.family.shapes(CFG), std=1.0)
    frozen = {'vision': params['vision'], 'language': params['language']}
    soft = CFG.family.soft_words(params, CFG, {'pixel_values': images(1)})[0]
    frozen['language'] = params['language'] | {'embed': jnp.asarray(params['language']['embed']).at[:8].set(soft)}
    batch = {'pixel_values': images(1), 'words': jnp.arange(8, dtype=jnp.int32)[None]}
    bridge = {name: params[name] for name in ('qformer', 'projection')}
    _, metrics = pretrain.words_loss(bridge, frozen, batch, cfg=CFG)
    assert float(metrics['regression']) < 1e-6
    assert float(metrics['nearest']) == 1.0


@pytest.mark.processes
def test_the_script_makes_a_bridge_that_loads_and_resumes(
    script, tmp_path, monkeypatch, random_params, easy_vqa_builder
):
    monkeypatch.setattr(easy_vqa, 'prepare', lambda data_dir: easy_vqa_builder)
    language = random_params(llama.shapes(CFG.language))
    monkeypatch.setattr(gguf, 'load_llama', lambda *args, **options: (CFG.language, language))
    stages = ('facts', 'words', 'answers', 'lora')
    knobs = {
        f'{stage}.{name}': value for stage in stages for name, value in (('steps', 2), ('batch', 4), ('warmup', 1))
    }
    knobs |= {'vision.width': 16, 'vision.heads': 2, 'vision.depth': 1, 'vision.mlp_width': 32, 'vision.patch_size': 16}
    knobs |= {'qformer.width': 16, 'qformer.heads': 2, 'qformer.pairs': 1, 'qformer.mlp_width': 32, 'eval_questions': 4}
    flags = ['--config=configs/demo_pretrain.py', f'--workdir={tmp_path}']
    flags += [f'--config.{name}={value}' for name, value in knobs.items()]
    code, _out, err = script('pretrain.py', *flags)
    assert code == 0, err
    assert 'facts 2/2' in err, err
    file = tmp_path / embedded.BRIDGE.name
    model, params = embedded.load(file)
    assert model.cfg == CFG
    changed = rules.flatten(params)['language/blocks/attn/q/kernel'] != language['blocks']['attn']['q']['kernel']
    assert bool(jnp.any(changed))  # the shipped factors are merged
    written, _ = sl.load_safetensors(file)
    code, _out, err = script('pretrain.py', *flags)
    assert code == 0, err
    assert 'facts 2/2' not in err  # every stage is taken from its checkpoint
    code, _out, err = script('pretrain.py', *flags, '--config.seed=1')
    assert code == 1
    assert 'seed is 1 here and 42 in the workdir' in err
    again, _ = sl.load_safetensors(file)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, written, again))
