"""What is exported is what others read: torch loads it without a word, with our logits and our zeros."""

import json
import shutil

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tiny_retrieval
import torch
import torch_models
from safetensors.numpy import load_file, save_file
from transformers import Blip2ForImageTextRetrieval

import sparselora_jax as sl
from sparselora_jax.checkpoints import hf_configs, layout, streaming
from sparselora_jax.checkpoints.export import check_export, export_model
from sparselora_jax.checkpoints.load import load_model
from sparselora_jax.checkpoints.write_new import write_new
from sparselora_jax.models import blip2, causal, llama, qformer, vit
from sparselora_jax.models.model import Generation, Model, from_hf
from sparselora_jax.sparse import rules

LOGITS = jax.jit(Model.logits, static_argnums=0)
WEIGHTS = '*.safetensors'


@pytest.fixture(scope='module')
def saved(tmp_path_factory, perturbed):
    """`saved(name, dtype)`: a directory in shards, with more beside the weights, and weights of another format."""
    made = {}

    def save(name, dtype=torch.float32):
        if (name, dtype) not in made:
            folder = made[name, dtype] = tmp_path_factory.mktemp('model')
            torch_models.build(name, perturbed).to(dtype).save_pretrained(folder, max_shard_size='30KB')
            (folder / 'tokenizer.json').write_text('{"made": "up"}')
            (folder / 'templates').mkdir()
            (folder / 'templates' / 'chat.jinja').write_text('{{ text }}')
            (folder / '.cache').mkdir()
            (folder / '.cache' / 'lock').write_text('')
            (folder / 'pytorch_model.bin').write_bytes(b'dense')
        return made[name, dtype]

    return save


def pruned(params):
    """(params with zeros and other numbers in their blocks, the masks)."""
    changed = jax.tree.map(lambda leaf: leaf * jnp.asarray(0.75, leaf.dtype), params)
    return sl.prune_tree(changed, None, [('.*/blocks/.*', '2:4'), ('.*', 'dense')], method=sl.Magnitude())


OF_SEVERAL = 'blip2 opt', 'blip2 t5', 'instructblip llama', 'instructblip t5'  # whose towers others have too


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[pytest.mark.slow] if n in OF_SEVERAL else []) for n in torch_models.CONFIGS]
)
def test_torch_reads_the_same_model(name, saved, tmp_path):
    model, params = load_model(saved(name))
    params, _ = pruned(params)
    export_model(tmp_path / 'new', model, params)
    check_export(tmp_path / 'new', model, params)
    module = torch_models.load(tmp_path / 'new', torch_models.CLASSES[type(torch_models.CONFIGS[name]())])
    assert jax.tree.all(jax.tree.map(np.array_equal, load_model(tmp_path / 'new')[1], params))
    if name in ('tied llama', 'blip2 t5', 'llava'):  # the others' logits are compared where they are read
        given = torch_models.batch(model)
        np.testing.assert_allclose(LOGITS(model, params, given), torch_models.logits(module, given), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', ['llama', 'blip2 opt'])
def test_zeros_are_zeros_in_the_file_and_nothing_else_is(name, dtype, saved, tmp_path):
    model, params = load_model(saved(name, dtype), dtype=jnp.float32)
    params, masks = pruned(params)
    export_model(tmp_path, model, params)
    entries = {name: array for file in tmp_path.glob(WEIGHTS) for name, array in load_file(file).items()}
    masks, checked = rules.flatten(masks), set()
    for key, places in layout.places(model.family, model.cfg).items():
        for place in places:
            if place.path in masks:
                rows = np.split(entries[key], place.of)[place.index]
                np.testing.assert_array_equal(rows != 0, masks[place.path][place.layer].T)
                checked.add(place.path)
    assert checked == masks.keys()
    assert len(checked) >= 7


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', ['blip2 t5', 'instructblip llama', 'llava'])
def test_what_was_not_changed_is_the_same_to_the_byte(name, dtype, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, 'PIECE', 2000)
    source = saved(name, dtype)
    model, params = load_model(source, dtype=jnp.float32)
    export_model(tmp_path, model, params)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*') if path.is_file())
    assert 'templates/chat.jinja' in names
    assert 'model.safetensors.index.json' in names
    own = [str(path.relative_to(source)) for path in source.rglob('*') if path.is_file()]
    assert names == sorted(name for name in own if not name.startswith('.cache') and not name.endswith('.bin'))
    for file in names:
        assert (tmp_path / file).read_bytes() == (source / file).read_bytes()


def test_unread_tensors_stay_and_read_ones_change(saved, tmp_path):
    source = saved('llava')  # CLIP's last layer is not read
    model, params = load_model(source)
    export_model(tmp_path, model, jax.tree.map(lambda leaf: leaf + 1, params))
    before, after = (
        {n: a for f in folder.glob(WEIGHTS) for n, a in load_file(f).items()} for folder in (source, tmp_path)
    )
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {name for name in before if 'tower.encoder.layers.1.' in name or 'post_layernorm' in name}


@pytest.mark.slow
def test_a_sharded_model_is_exported_as_one_that_is_not(saved, tmp_path):
    from sparselora_jax.sparse.sharding import make_mesh

    for name, mesh in (('one', None), ('many', make_mesh(fsdp=2, tensor=2))):
        model, params = load_model(saved('llama'), mesh=mesh)
        export_model(tmp_path / name, model, jax.tree.map(lambda leaf: leaf * 3, params))
    for file in (tmp_path / 'one').glob(WEIGHTS):
        assert file.read_bytes() == (tmp_path / 'many' / file.name).read_bytes()


def test_arrays_of_numpy_are_exported_too(saved, tmp_path):
    model, params = load_model(saved('blip2 opt'))
    export_model(tmp_path, model, jax.tree.map(np.asarray, params))
    check_export(tmp_path, model, params)


def test_a_copied_head_follows_the_embeddings(saved, tmp_path):
    source = tmp_path / 'source'
    module = torch_models.CLASSES[type(torch_models.CONFIGS['tied llama']())].from_pretrained(saved('tied llama'))
    module.save_pretrained(source)
    tensors = load_file(source / 'model.safetensors')
    save_file(tensors | {'lm_head.weight': tensors['model.embed_tokens.weight']}, source / 'model.safetensors')
    model, params = load_model(source)
    export_model(tmp_path / 'new', model, jax.tree.map(lambda leaf: leaf * 2, params))
    tensors = load_file(tmp_path / 'new' / 'model.safetensors')
    np.testing.assert_array_equal(tensors['lm_head.weight'], tensors['model.embed_tokens.weight'])
    np.testing.assert_array_equal(tensors['lm_head.weight'], 2 * params['language']['embed'])


def test_every_copy_of_t5s_embeddings_follows(saved, tmp_path):
    source = shutil.copytree(saved('blip2 t5'), tmp_path / 'source')
    shared = 'language_model.shared.weight'
    copies = [f'language_model.{name}.weight' for name in ('encoder.embed_tokens', 'decoder.embed_tokens', 'lm_head')]
    index = json.loads((source / 'model.safetensors.index.json').read_text())
    file = source / index['weight_map'][shared]
    tensors = load_file(file)
    save_file(tensors | dict.fromkeys(copies, tensors[shared]), file)
    index['weight_map'] |= dict.fromkeys(copies, file.name)
    (source / 'model.safetensors.index.json').write_text(json.dumps(index))
    model, params = load_model(source)
    export_model(tmp_path / 'new', model, jax.tree.map(lambda leaf: leaf * 2, params))
    written = load_file(tmp_path / 'new' / file.name)
    for name in (shared, *copies):
        np.testing.assert_array_equal(written[name], 2 * params['language']['embed'])


def test_an_interrupted_export_is_not_a_model_and_can_be_repeated(saved, tmp_path, monkeypatch):
    model, params = load_model(saved('llama'))
    export_model(tmp_path, model, params, texts={'more.json': '[]'})
    real, calls = streaming.read_block, []

    def failing(array, piece):
        calls.append(piece)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return real(array, piece)

    changed = jax.tree.map(lambda leaf: leaf * 3, params)
    monkeypatch.setattr(streaming, 'read_block', failing)
    with pytest.raises(KeyboardInterrupt):
        export_model(tmp_path, model, changed, texts={'more.json': '[]'})
    monkeypatch.undo()
    assert not (tmp_path / 'config.json').exists()
    assert not list(tmp_path.glob('*.partial'))
    for file in tmp_path.glob(WEIGHTS):
        load_file(file)  # whole: as it was, or as it should be
    export_model(tmp_path, model, changed, texts={'more.json': '[1]'})
    check_export(tmp_path, model, changed)
    assert json.loads((tmp_path / 'more.json').read_text()) == [1]


def test_it_refuses_its_source_and_foreign_directories(saved, tmp_path):
    source = shutil.copytree(saved('llama'), tmp_path / 'source')
    model, params = load_model(source)
    (tmp_path / 'link').symlink_to(source)
    for folder in (source, tmp_path / 'link', f'{source}/../source'):
        with pytest.raises(sl.StorageError, match='is the directory the model was read from'):
            export_model(folder, model, params)
    (tmp_path / 'foreign').mkdir()
    (tmp_path / 'foreign' / 'thesis.tex').write_text('')
    with pytest.raises(sl.StorageError, match=r'holds files of something else \(thesis.tex\)'):
        export_model(tmp_path / 'foreign', model, params)
    assert [path.name for path in (tmp_path / 'foreign').iterdir()] == ['thesis.tex']


def test_params_that_do_not_fit_are_named(saved, tmp_path):
    model, params = load_model(saved('llama'))
    del params['language']['blocks']['mlp']['up']
    with pytest.raises(sl.StorageError, match='language/blocks/mlp/up/kernel is missing'):
        export_model(tmp_path / 'new', model, params)
    with pytest.raises(sl.StorageError, match='read from no Hugging Face directory'):
        export_model(tmp_path / 'new', Model(model.cfg, model.generation), params)
    assert not (tmp_path / 'new').exists()


def test_numbers_too_large_for_the_file_are_named(saved, tmp_path):
    model, params = load_model(saved('llama', torch.float16), dtype=jnp.float32)
    params['language']['norm']['scale'] = params['language']['norm']['scale'].at[3].set(1e5)
    with pytest.raises(sl.StorageError, match='language/norm/scale: numbers too large for float16'):
        export_model(tmp_path, model, params)


def test_a_changed_byte_is_found(saved, tmp_path):
    model, params = load_model(saved('llama'))
    export_model(tmp_path, model, params)
    file = sorted(tmp_path.glob(WEIGHTS))[0]
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(sl.StorageError, match=f'{file.name}: .*, read back, is not what was written'):
        check_export(tmp_path, model, params)


LANGUAGE = llama.LlamaConfig(
    vocab=40, width=32, depth=2, heads=4, kv_heads=2, mlp_width=48, rope_base=500.0, norm_eps=1e-3
)
GENERATION = Generation(eos=(2, 3), pad=1, bos=0, options=(('num_beams', 3),))


def new_models():
    vision = vit.ViTConfig(image_size=16, patch_size=4, width=24, depth=2, heads=4, mlp_width=40)
    bridge = qformer.QFormerConfig(queries=5, width=16, pairs=2, heads=2, mlp_width=28, image_width=24)
    untied = llama.LlamaConfig(**{**vars(LANGUAGE), 'tied': False})
    for language in (LANGUAGE, untied):
        yield causal.CausalConfig(language), hf_configs.llama_config(language, GENERATION)
        cfg = blip2.Blip2Config(vision, bridge, language, image_token=torch_models.IMAGE)
        yield cfg, hf_configs.blip2_config(cfg, GENERATION)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(('cfg', 'config'), list(new_models()), ids=['llama', 'blip2', 'untied llama', 'untied blip2'])
def test_a_model_without_a_directory_gets_one(cfg, config, dtype, random_params, tmp_path, tokenizer):
    model = Model(cfg, GENERATION)
    params, _ = pruned(jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(model.shapes())))
    write_new(tmp_path, config, model, params, processor=tokenizer, texts={'more.json': '[]'})
    check_export(tmp_path, model, params)
    again, read = load_model(tmp_path)
    assert again == model or isinstance(cfg, blip2.Blip2Config)
    assert again.cfg == cfg
    assert again.generation.eos == (2, 3)
    assert again.generation.pad == 1
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), read, params))
    assert (tmp_path / 'tokenizer.json').exists()
    assert (tmp_path / 'more.json').read_text() == '[]'
    module = torch_models.load(tmp_path, torch_models.CLASSES[type(config)])
    assert module.get_input_embeddings().weight.dtype == (torch.float32 if dtype == jnp.float32 else torch.bfloat16)
    if dtype == jnp.float32:
        given = torch_models.batch(model)
        np.testing.assert_allclose(LOGITS(model, params, given), torch_models.logits(module, given), atol=1e-4)


@pytest.mark.slow
def test_a_retrieval_model_without_a_directory_gets_one(random_params, tmp_path):
    config = tiny_retrieval.config(30, architectures=['Blip2ForImageTextRetrieval'])
    model = Model(from_hf(config), Generation(eos=(1,), pad=0))
    # It has no language tower, whose word embeddings tell the config's dtype of other models.
    params = random_params(model.shapes())
    write_new(tmp_path, config, model, params)
    check_export(tmp_path, model, params)
    again, read = load_model(tmp_path)
    assert again.cfg == model.cfg
    jax.tree.map(np.testing.assert_array_equal, read, params)
    module, notes = Blip2ForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes.values()), notes
    assert module.dtype == torch.float32


def test_a_new_directory_does_not_mix_with_other_weights(random_params, tmp_path):
    cfg, config = next(new_models())
    model = Model(cfg, GENERATION)
    params = random_params(model.shapes())
    write_new(tmp_path, config, model, params)
    write_new(tmp_path, config, model, params)  # its own: written again
    (tmp_path / 'model-00001-of-00002.safetensors').write_bytes(b'')
    with pytest.raises(sl.StorageError, match='holds other weights'):
        write_new(tmp_path, config, model, params)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_written(bad, saved, tmp_path):
    model, params = load_model(saved('llama'))
    path, kernel = next(iter(rules.kernels(params).items()))
    wrong = rules.with_leaves(params, {path: kernel.at[0, 0].set(bad)})
    with pytest.raises(sl.SparseloraError, match=path):
        export_model(tmp_path / 'out', model, wrong)
    assert not (tmp_path / 'out' / 'config.json').exists()


WRONG_TEXTS = [{'../a.txt': 'x'}, {'/a.txt': 'x'}, {'config.json': 'x'}, {'model.safetensors': 'x'}, {'a.txt': 3}]


@pytest.mark.parametrize('texts', WRONG_TEXTS, ids=str)
def test_a_text_cannot_leave_the_folder_or_replace_a_file_of_the_model(texts, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
    model, params = load_model(saved('llama'))
    with pytest.raises(sl.StorageError, match=r'^text '):
        export_model(tmp_path / 'out', model, params, texts=texts)
    assert not (tmp_path / 'out').exists()
