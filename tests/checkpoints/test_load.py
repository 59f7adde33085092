"""Directories as torch writes them are read: the same logits, whatever the layout; what does not fit is named."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from safetensors.numpy import load_file, save_file

import sparselora_jax as sl
from sparselora_jax.checkpoints import layout, on_disk, safetensors_format
from sparselora_jax.checkpoints.load import load_model, open_model
from sparselora_jax.evaluation.generate import check_options
from sparselora_jax.models.model import Model
from sparselora_jax.runtime.errors import UnsupportedModelError
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.sharding import make_mesh

LOGITS = jax.jit(Model.logits, static_argnums=0)


@pytest.fixture(scope='module')
def saved(tmp_path_factory, perturbed):
    """`saved(name, **options)`: (torch's model, the directory it was saved to), made once."""
    made = {}

    def save(name, **options):
        key = (name, *options.items())
        if key not in made:
            module, folder = torch_models.build(name, perturbed), tmp_path_factory.mktemp('model')
            module.save_pretrained(folder, **options)
            made[key] = module, folder
        return made[key]

    return save


@pytest.fixture
def llama(saved, tmp_path):
    """A directory to damage."""
    return shutil.copytree(saved('llama')[1], tmp_path / 'llama')


def edit(folder, change):
    """Changes the tensors of a directory."""
    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})


def check(module, folder):
    model, params = load_model(folder)
    given = torch_models.batch(model)
    want = torch_models.logits(module, given)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(LOGITS(model, params, given), want, atol=1e-4)
    return model, params


@pytest.mark.slow
@pytest.mark.parametrize('name', torch_models.CONFIGS)
def test_logits_of_every_family_equal_torch(name, saved):
    module, folder = saved(name)
    model, params = check(module, folder)
    assert {path: leaf.shape for path, leaf in rules.flatten(params).items()} == rules.flatten(model.shapes())
    assert model.source == str(folder)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['llama', 'blip2 opt', 'llava', 'paligemma'])
def test_shards_and_rows_change_nothing(name, saved, monkeypatch):
    whole = load_model(saved(name)[1])[1]
    folder = saved(name, max_shard_size='20KB')[1]
    assert len(list(folder.glob('*.safetensors'))) > 3
    monkeypatch.setattr(layout, 'PIECE', 700)  # most tensors in several runs of rows
    assert jax.tree.all(jax.tree.map(np.array_equal, load_model(folder)[1], whole))


@pytest.mark.parametrize('name', ['llava', 'paligemma'])
def test_both_namings_are_read(name, saved):
    for old in (True, False):
        module, folder = saved(name, save_original_format=old)
        names = load_file(folder / 'model.safetensors').keys()
        assert any(key.startswith('model.language_model.') for key in names) != old
        check(module, folder)


def test_names_of_published_vision_towers_are_read(saved, tmp_path):
    module, folder = saved('llava')
    folder = shutil.copytree(folder, tmp_path / 'older')

    def rename(tensors):
        for name in [name for name in tensors if name.startswith('vision_tower.')]:
            tensors[name.replace('vision_tower.', 'vision_tower.vision_model.')] = tensors.pop(name)
        tensors['vision_tower.vision_model.embeddings.position_ids'] = np.arange(17)[None]
        for name in [name for name in tensors if name.startswith('lm_head.')]:
            tensors['language_model.' + name] = tensors.pop(name)

    edit(folder, rename)
    check(module, folder)


@pytest.mark.parametrize('name', ['llama', pytest.param('blip2 opt', marks=pytest.mark.slow)])
def test_a_mesh_holds_the_same_arrays(name, saved, monkeypatch):
    monkeypatch.setattr(layout, 'PIECE', 3000)
    _, folder = saved(name)
    whole, split = (load_model(folder, mesh=mesh)[1] for mesh in (None, make_mesh(fsdp=2, tensor=2)))
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, split))
    kernel = split['language']['blocks']['attn']['q']['kernel']
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 16, 16)}


def test_each_shape_compiles_once(saved):
    from sparselora_jax.checkpoints import streaming

    streaming._convert.clear_cache()
    load_model(saved('llama')[1])
    # q and o; k and v; gate and up; down; scales of layers; the last scale; embeddings; head: not one a layer.
    assert streaming._convert._cache_size() == 8


@pytest.mark.parametrize('dtype', [None, jnp.float32, jnp.bfloat16])
def test_dtypes_are_the_files_own_or_as_asked(dtype, saved, tmp_path):
    module, _ = saved('llama')
    module = torch_models.CLASSES[type(module.config)].from_pretrained(saved('llama')[1], dtype=torch.float16)
    module.save_pretrained(tmp_path)
    _, params = load_model(tmp_path, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype or jnp.float16)}
    want = module.model.embed_tokens.weight.detach().float().numpy().astype(jnp.dtype(dtype or jnp.float16))
    np.testing.assert_array_equal(params['language']['embed'], want)


def test_a_t5_in_float16_is_refused_before_it_is_read(saved, tmp_path, monkeypatch):
    module, folder = saved('blip2 t5')
    type(module).from_pretrained(folder, dtype=torch.float16).save_pretrained(tmp_path)
    load_model(tmp_path, dtype=jnp.float32)
    monkeypatch.setattr(safetensors_format, 'read', lambda *_: pytest.fail('a weight was read'))
    for where, dtype in ((tmp_path, None), (folder, 'float16')):
        with pytest.raises(UnsupportedModelError, match=r'language/.* in float16.*load as float32 or bfloat16'):
            load_model(where, dtype=dtype)
    with pytest.raises(UnsupportedModelError, match='load as float32 or bfloat16'):
        on_disk.params_on_disk(*open_model(folder), jnp.float16)


def test_of_several_dtypes_a_stack_has_the_widest(llama):
    name = 'model.layers.1.mlp.up_proj.weight'
    edit(
        llama, lambda tensors: tensors.update({key: w.astype(np.float16) for key, w in tensors.items() if key != name})
    )
    _, params = load_model(llama)
    mlp = params['language']['blocks']['mlp']
    assert mlp['up']['kernel'].dtype == jnp.float32
    assert mlp['down']['kernel'].dtype == jnp.float16


def test_a_head_in_the_file_is_followed(saved, tmp_path):
    module, folder = saved('tied llama')
    copied, own = (shutil.copytree(folder, tmp_path / name) for name in ('copied', 'own'))

    def copy(tensors):
        tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()

    edit(copied, copy)
    assert 'head' not in check(module, copied)[1]['language']

    def differ(tensors):
        copy(tensors)
        tensors['lm_head.weight'][3, 4] += 1

    edit(own, differ)
    model, params = load_model(own)
    assert not model.cfg.language.tied
    np.testing.assert_array_equal(
        params['language']['head']['kernel'].T, load_file(own / 'model.safetensors')['lm_head.weight']
    )


def renamed(source, folder, *names, drop):
    """A copy of a directory whose embeddings lie under other names."""
    shutil.copytree(source, folder)
    edit(folder, lambda tensors: tensors.update(dict.fromkeys(names, tensors.pop(drop))))
    return folder


@pytest.mark.parametrize(
    ('name', 'drop', 'names'),
    [
        ('tied llama', 'model.embed_tokens.weight', ['lm_head.weight']),
        ('opt', 'model.decoder.embed_tokens.weight', ['lm_head.weight']),
        ('paligemma', 'language_model.model.embed_tokens.weight', ['lm_head.weight']),
        ('blip2 t5', 'language_model.shared.weight', ['language_model.lm_head.weight']),
        ('blip2 t5', 'language_model.shared.weight', ['language_model.encoder.embed_tokens.weight']),
        (
            'instructblip t5',
            'language_model.shared.weight',
            [f'language_model.{name}.weight' for name in ('decoder.embed_tokens', 'lm_head', 'encoder.embed_tokens')],
        ),
    ],
)
def test_a_tied_embedding_under_another_name_is_read_as_torch_reads_it(name, drop, names, saved, tmp_path):
    module, folder = saved(name)
    folder = renamed(folder, tmp_path / 'model', *names, drop=drop)
    model, params = check(type(module).from_pretrained(folder).eval(), folder)
    assert model.cfg.language.tied
    for entry in names:
        np.testing.assert_array_equal(params['language']['embed'], load_file(folder / 'model.safetensors')[entry])


def test_an_untied_embedding_under_another_name_is_missing(saved, tmp_path):
    folder = renamed(saved('llama')[1], tmp_path / 'model', 'lm_head.weight', drop='model.embed_tokens.weight')
    with pytest.raises(sl.StorageError, match=r'1 tensors are missing: model.embed_tokens.weight'):
        open_model(folder)


def test_embeddings_of_t5s_stacks_that_differ_are_named(saved, tmp_path):
    folder = shutil.copytree(saved('blip2 t5')[1], tmp_path / 'model')
    name = 'language_model.encoder.embed_tokens.weight'
    edit(folder, lambda tensors: tensors.update({name: tensors['language_model.shared.weight'] + 1}))
    with pytest.raises(sl.StorageError, match=f'{name} is not equal to language_model.shared.weight'):
        open_model(folder)


def test_an_untied_t5_is_followed(saved, tmp_path):
    module, folder = saved('blip2 t5')
    folder, head = shutil.copytree(folder, tmp_path / 'untied'), module.language_model.lm_head
    rng, shared = np.random.default_rng(0), head.weight
    edit(
        folder,
        lambda tensors: tensors.update({'language_model.lm_head.weight': rng.normal(size=(40, 32)).astype('f4')}),
    )
    try:
        head.weight = torch.nn.Parameter(
            torch.asarray(load_file(folder / 'model.safetensors')['language_model.lm_head.weight'])
        )
        check(module, folder)
    finally:
        head.weight = shared


def test_a_head_that_the_config_asks_for_must_be_there(llama):
    edit(llama, lambda tensors: tensors.pop('lm_head.weight'))
    with pytest.raises(
        sl.StorageError, match=r'model.safetensors: 1 tensors are missing.*lm_head.weight \(40, 32\) for'
    ):
        load_model(llama)


def test_missing_tensors_are_named(llama):
    edit(llama, lambda tensors: [tensors.pop(name) for name in list(tensors) if 'layers.1.' in name])
    with pytest.raises(sl.StorageError) as error:
        load_model(llama)
    assert 'model.safetensors: 9 tensors are missing' in str(error.value)
    assert 'model.layers.1.mlp.down_proj.weight (32, 48) for language/blocks/mlp/down/kernel' in str(error.value)
    assert 'and 4 more' in str(error.value)


def test_extra_tensors_are_named(llama):
    edit(llama, lambda tensors: tensors.update({'model.layers.7.bias': np.ones((2, 3), 'f4')}))
    with pytest.raises(sl.StorageError, match=r'1 tensors belong to no parameter.*: model.layers.7.bias \(2, 3\)'):
        load_model(llama)


def test_misshapen_tensors_are_named(llama):
    def transpose(tensors):
        tensors['model.layers.0.mlp.up_proj.weight'] = tensors['model.layers.0.mlp.up_proj.weight'].T.copy()

    edit(llama, transpose)
    with pytest.raises(sl.StorageError) as error:
        load_model(llama)
    assert 'model.layers.0.mlp.up_proj.weight has (32, 48), expected (48, 32) for language/blocks/mlp/up/kernel' in str(
        error.value
    )


def test_fused_tensors_of_the_wrong_shape_are_named(saved, tmp_path):
    folder = shutil.copytree(saved('blip2 opt')[1], tmp_path / 'model')
    name = 'vision_model.encoder.layers.0.self_attn.qkv.weight'
    edit(folder, lambda tensors: tensors.update({name: tensors[name][:-3].copy()}))
    with pytest.raises(sl.StorageError, match=r'qkv.weight has \(69, 24\), expected \(72, 24\) for vision/.*, fused'):
        load_model(folder)


def test_two_names_of_one_parameter_are_named(llama):
    edit(llama, lambda tensors: tensors.update({'norm.weight': tensors['model.norm.weight']}))
    with pytest.raises(sl.StorageError, match=r'norm.weight.* both mean model.norm.weight'):
        load_model(llama)


def reconfigure(folder, **changes):
    file = folder / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_unknown_models_are_refused(llama):
    reconfigure(llama, model_type='mamba', auto_map={'AutoConfig': 'evil.Config'})
    with pytest.raises(UnsupportedModelError, match=r"config.json: model_type 'mamba': expected one of blip-2, gemma"):
        load_model(llama)
    reconfigure(llama, model_type='llama', quantization_config={'quant_method': 'gptq'})
    with pytest.raises(UnsupportedModelError, match='quantised weights'):
        load_model(llama)


@pytest.mark.parametrize('text', ['', '[]', '{"model_type": '])
def test_a_config_that_is_none_is_named(text, llama):
    (llama / 'config.json').write_text(text)
    with pytest.raises(sl.StorageError, match=r'config.json: not (JSON \(.*char \d|a JSON object)'):
        load_model(llama)


def test_a_config_that_transformers_refuses_is_named(llama):
    reconfigure(llama, hidden_act=['silu'])
    with pytest.raises(sl.StorageError, match=r'config.json: transformers does not read it'):
        load_model(llama)


@pytest.mark.parametrize('name', ['/no/such/directory', 'no/such/directory', 'word', '../x/y', 'a b/c'])
def test_what_is_neither_directory_nor_id_is_named(name):
    with pytest.raises(sl.StorageError, match='no such directory, nor the id of a hub repository'):
        load_model(name)


def test_a_repository_is_downloaded_without_pickles(saved, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, 'snapshot_download', lambda name, **kw: asked.update(kw, name=name) or str(saved('llama')[1])
    )
    model, _ = load_model('owner/name')
    assert asked['name'] == 'owner/name'
    assert model.source == str(saved('llama')[1])
    files = ['config.json', 'model-00001-of-00002.safetensors', 'tokenizer.model', 'merges.txt', 'pytorch_model.bin']
    kept = huggingface_hub.utils.filter_repo_objects(
        [*files, 'original/model.safetensors', 'consolidated.safetensors'],
        allow_patterns=asked['allow_patterns'],
        ignore_patterns=asked['ignore_patterns'],
    )
    assert list(kept) == files[:-1]


def test_a_repository_of_pickles_alone_is_refused_with_a_command(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **kw: str(tmp_path))
    with pytest.raises(sl.StorageError) as error:
        load_model('owner/name')
    said = str(error.value)
    assert said.startswith('owner/name: ')
    assert 'no safetensors' in said
    assert 'unpickling runs whatever code' in said
    assert 'convert it' in said
    assert said.endswith(' owner/name name-safetensors')


def test_offline_it_says_what_to_download(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(
        sl.StorageError, match=r'owner/name: no such directory, and the hub.* run: hf download owner/name '
    ):
        load_model('owner/name')


def test_generation_defaults_come_from_the_directory(llama):
    (llama / 'generation_config.json').write_text(
        json.dumps({'eos_token_id': [5, 6], 'bos_token_id': 1, 'num_beams': 4, 'length_penalty': -1.0})
    )
    generation = load_model(llama)[0].generation
    assert generation.eos == (5, 6)
    assert generation.pad == 5
    assert generation.bos == 1
    assert generation.start is None
    assert generation.options == (('length_penalty', -1.0), ('num_beams', 4))
    assert hash(generation)


def test_options_of_nested_lists_are_hashable(llama):
    (llama / 'generation_config.json').write_text(json.dumps({'bad_words_ids': [[5, 6], [7]]}))
    model, _ = open_model(llama)
    assert hash(model)
    assert model.generation.options == (('bad_words_ids', ((5, 6), (7,))),)


@pytest.mark.parametrize('text', ['', '{', '[]', '"no"', '[1, 2'])
def test_a_damaged_generation_config_is_named(text, llama):
    (llama / 'generation_config.json').write_text(text)
    with pytest.raises(sl.StorageError, match=f'{llama}/generation_config.json: '):
        open_model(llama)


def test_blip2_generates_as_its_language_model_does(saved):
    module, folder = saved('blip2 t5')
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': 9, 'num_beams': 4}))
    generation, theirs = load_model(folder)[0].generation, module.language_model.generation_config
    assert generation.eos == (theirs.eos_token_id,)
    assert generation.pad == theirs.pad_token_id
    assert generation.start == theirs.decoder_start_token_id == 0
    assert generation.options == ()


@pytest.mark.parametrize('value', [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_named_with_their_file_when_they_are_read(value, llama):
    name = 'model.layers.1.mlp.up_proj.weight'
    edit(llama, lambda tensors: tensors[name].put(7, value))
    said = rf'model.safetensors: {name} \(language/blocks/mlp/up/kernel\) has NaN or infinite numbers'
    with pytest.raises(sl.StorageError, match=said):
        load_model(llama)
    model, pieces = open_model(llama)
    stack = rules.flatten(on_disk.params_on_disk(model, pieces, jnp.float32))['language/blocks/mlp/up/kernel']
    assert np.isfinite(stack[0]).all()
    with pytest.raises(sl.StorageError, match=said):
        stack[1]


def test_forced_tokens_are_kept_to_be_refused_and_options_without_effect_are_accepted(llama):
    def options(**entries):
        (llama / 'generation_config.json').write_text(json.dumps(entries))
        return open_model(llama)[0]

    neutral = {'suppress_tokens': [], 'guidance_scale': 1.0, 'forced_eos_token_id': None, 'repetition_penalty': 1.0}
    check_options(options(**neutral, bad_words_ids=[], temperature=0.6, top_p=0.9, transformers_version='4.1'))
    for name, value in {
        'forced_eos_token_id': 2,
        'forced_bos_token_id': 3,
        'sequence_bias': [[[45, 67], -0.6]],
        'watermarking_config': {'bias': 2.5},
        'suppress_tokens': [4],
        'guidance_scale': 1.5,
    }.items():
        model = options(**{name: value})
        assert hash(model)
        with pytest.raises(sl.GenerationError, match=f'{llama}/generation_config.json: {name} = .* is not supported'):
            check_options(model)


@pytest.mark.parametrize('dtype', ['int8', 'foo', 'bool', 'complex64'])
def test_weights_have_a_floating_point_dtype(llama, dtype):
    with pytest.raises(UnsupportedModelError, match=f'dtype {dtype!r}: expected a floating-point dtype'):
        load_model(llama, dtype=dtype)


@pytest.mark.parametrize(('name', 'value'), [('eos_token_id', 'x'), ('bos_token_id', {}), ('pad_token_id', 1.5)])
def test_a_special_token_that_is_no_token_is_named(llama, name, value):
    (llama / 'generation_config.json').write_text(json.dumps({name: value}))
    with pytest.raises(sl.StorageError, match=f'generation_config.json: .*{name}|not defaults of decoding'):
        open_model(llama)


def test_a_config_of_thousands_of_brackets_is_named(llama):
    (llama / 'config.json').write_text('[' * 200_000)
    with pytest.raises(sl.StorageError, match=r'config\.json: not JSON'):
        open_model(llama)
