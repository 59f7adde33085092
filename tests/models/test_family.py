"""A family that the package does not know: registered or named, its models are loaded, processed, trained, exported."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import their_family
import tiny_models
from safetensors.numpy import load_file, save_file
from tiny_jobs import SMALL

import sparselora_jax as sl
from configs import llava_both
from sparselora_jax.checkpoints import export, trees
from sparselora_jax.data.processor_spec import PROCESSORS
from sparselora_jax.jobs import stages
from sparselora_jax.jobs.job import Job
from sparselora_jax.models.config import FamilyConfig, ImageConfig, LanguageConfig, VisionConfig
from sparselora_jax.models.family import FAMILIES, Family, find_family, register_family
from sparselora_jax.models.llava import LlavaFamily
from sparselora_jax.models.model import Model, abstract_model, abstract_params, from_hf
from sparselora_jax.models.runners import Runner, remat_blocks, scan_blocks, unrolled_blocks
from sparselora_jax.models.towers import (
    LANGUAGE_TOWERS,
    VISION_TOWERS,
    DecoderTower,
    EncoderDecoderTower,
    LanguageTower,
    VisionTower,
)
from sparselora_jax.runtime.errors import UnsupportedModelError
from sparselora_jax.runtime.registry import UnknownNameError

NAMED = 'their_family:FAMILY'
PACKAGE = Path(sl.__file__).parent


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    """A Hugging Face directory of their family: a tiny LLaVA's, its projector cut to one layer."""
    folder = tmp_path_factory.mktemp('theirs')
    tiny_models.save('llava-default', folder)
    tensors = load_file(folder / 'model.safetensors')
    for part in ('weight', 'bias'):
        (second,) = (name for name in tensors if name.endswith(f'multi_modal_projector.linear_2.{part}'))
        (first,) = (name for name in tensors if name.endswith(f'multi_modal_projector.linear_1.{part}'))
        del tensors[second]
        tensors[first.replace('linear_1', 'linear')] = tensors.pop(first)
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | {'model_type': their_family.MODEL_TYPE}))
    return folder


@pytest.fixture(scope='module')
def registered():
    """Their family in the registry, by the one call that its author writes."""
    if their_family.MODEL_TYPE not in FAMILIES:
        register_family(their_family.FAMILY, their_family.MODEL_TYPE)
    return their_family.FAMILY


def batch_of(processor):
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    return processor.prompt([picture], [processor.spec.text.write('is it red?')])


@pytest.mark.slow
def test_a_family_named_in_full_needs_no_registration(directory):
    model, params = sl.load_model(directory, family=NAMED)
    assert model.family is their_family.FAMILY
    batch = batch_of(sl.load_processor(directory, family=NAMED))
    logits = model.logits(params, batch)
    assert logits.shape == (1, batch['input_ids'].shape[1], model.cfg.language.vocab)
    assert np.isfinite(logits).all()
    other = model.logits(params, batch | {'pixel_values': -batch['pixel_values']})
    assert np.abs(np.asarray(logits - other)).max() > 1e-3  # the image is read


def test_without_a_name_it_is_unknown_until_it_is_registered(directory):
    if their_family.MODEL_TYPE in FAMILIES:
        pytest.skip('another test has registered it')
    with pytest.raises(UnsupportedModelError, match=r"model_type 'their_llava': expected one of blip-2, .*or a family"):
        sl.load_model(directory)


@pytest.mark.slow
def test_a_registered_family_is_found_by_its_model_type(directory, registered):
    model, params = sl.load_model(directory)
    assert model.family is registered
    processor = sl.load_processor(directory)
    assert processor.spec is registered.processor
    batch = batch_of(processor)
    named, again = sl.load_model(directory, family=NAMED)
    np.testing.assert_array_equal(model.logits(params, batch), named.logits(again, batch))
    tokens = sl.generate(model, params, batch, max_new_tokens=3)
    assert tokens.shape[1] <= batch['input_ids'].shape[1] + 3


def test_its_shapes_are_those_that_the_processor_makes(directory, registered):
    model, _ = sl.load_model(directory)
    text = registered.processor.text
    processor = sl.load_processor(directory)
    size = {'prompt_tokens': text.prompt_tokens, 'answer_tokens': text.answer_tokens}
    example = processor.example(np.zeros((9, 9, 3), np.uint8), text.write('a'), 'teal', **size)
    like = registered.batch_like(model.cfg, 5, **size)
    assert {name: (5, *array.shape) for name, array in example.items()} == {n: s.shape for n, s in like.items()}
    assert {name: array.dtype for name, array in example.items()} == {n: s.dtype for n, s in like.items()}


@pytest.mark.slow
@pytest.mark.parametrize('family', [NAMED, ''])
def test_the_main_job_prunes_trains_and_exports_it(directory, registered, tmp_path, family):
    tiny_models.save_data(tmp_path, 12)
    config = llava_both.get_config(f'model={directory},data={tmp_path},pattern=2:4,hardware=cpu')
    fields = {'text.prompt': registered.processor.text.prompt, 'prune.method': 'magnitude', 'evaluate.questions': 1}
    config.update_from_flattened_dict(SMALL | fields | {'family': family})
    job = Job(config, tmp_path / 'run')
    assert job.model.family is registered
    assert job.processor.spec is registered.processor
    stages.run(job)
    exported = tmp_path / 'run' / 'exported'
    model, params = sl.load_model(exported, family=family)
    export.check_export(exported, model, job.merged())
    sl.check_sparse(params, trees.load_safetensors(job.workdir / 'masks.safetensors')[0])


@pytest.mark.parametrize('wanted', ['blip-2', 'instructblip', 'llava', 'paligemma', 'llama', 'opt'])
@pytest.mark.parametrize('model_type', ['blip-2', 'instructblip', 'llava', 'paligemma', 'llama', 'opt'])
def test_a_registered_family_reads_only_its_own_models(model_type, wanted):
    own = FAMILIES.find(model_type)
    if FAMILIES.find(wanted) is own:
        assert find_family(model_type, wanted) is own
        return
    remedy = f'such as configs/{own.name}_lang_only.py' if own.processor else f'and {own.name} models have none'
    with pytest.raises(UnsupportedModelError) as error:
        find_family(model_type, wanted)
    message = f'model_type {model_type!r} is of the family {own.name}, not {FAMILIES.find(wanted).name}: '
    assert str(error.value).startswith(message)
    assert str(error.value).endswith(remedy)


def test_a_registered_family_reads_no_model_that_is_of_no_family():
    with pytest.raises(UnsupportedModelError, match="model_type 'llava_next': expected one of blip-2, "):
        find_family('llava_next', 'llava')


@pytest.mark.parametrize('read', [sl.load_model, sl.load_processor])
def test_a_directory_of_another_family_is_refused_with_its_path(tmp_path, read):
    (tmp_path / 'config.json').write_text('{"model_type": "llava"}')
    save_file({}, tmp_path / 'model.safetensors')
    with pytest.raises(UnsupportedModelError, match=r'config\.json: .* is of the family llava, not paligemma: '):
        read(tmp_path, family='paligemma')


@pytest.mark.parametrize(
    ('name', 'error', 'message'),
    [
        ('their_family:NOTHING', UnknownNameError, 'cannot be imported'),
        ('their_family', UnknownNameError, 'expected one of .*package.module:Name'),
        ('their_family:MODEL_TYPE', UnsupportedModelError, 'is a str: expected an object of the protocol Family'),
    ],
)
def test_a_name_that_is_no_family_is_refused(directory, name, error, message):
    with pytest.raises(error, match=message):
        sl.load_model(directory, family=name)


def test_a_family_that_leaves_something_out_is_refused_at_once():
    class Half(Family):
        name = 'half'

        def shapes(self, cfg):
            return {}

    with pytest.raises(TypeError, match='abstract'):
        Half()


def test_a_model_type_is_registered_once():
    with pytest.raises(ValueError, match="family 'llava' is registered already"):
        register_family(their_family.FAMILY, 'llava')


def test_built_in_towers_and_families_satisfy_their_protocols():
    for name in LANGUAGE_TOWERS:
        tower = LANGUAGE_TOWERS.find(name)
        assert isinstance(tower, LanguageTower)
        assert isinstance(tower, EncoderDecoderTower if tower.is_encoder_decoder else DecoderTower)
    assert all(isinstance(VISION_TOWERS.find(name), VisionTower) for name in VISION_TOWERS)
    assert all(isinstance(FAMILIES.find(name), Family) for name in FAMILIES)
    assert all(isinstance(run, Runner) for run in (scan_blocks, remat_blocks, unrolled_blocks))
    assert set(PROCESSORS) <= set(FAMILIES)


def test_a_config_knows_its_family_and_its_towers(directory):
    cfg = sl.load_model(directory, family=NAMED)[0].cfg
    assert isinstance(cfg, FamilyConfig)
    assert isinstance(cfg, ImageConfig)
    assert isinstance(cfg.language, LanguageConfig)
    assert isinstance(cfg.vision, VisionConfig)
    assert from_hf(their_family.TheirLlavaHfConfig(), NAMED).family is cfg.family
    assert abstract_model(cfg) == Model(cfg, abstract_model(cfg).generation)
    assert abstract_params(cfg)['projector']['kernel'].shape == (cfg.vision.width, cfg.language.width)


def strings(tree):
    """Every string of a file but docstrings and other strings that stand alone."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


def test_only_a_familys_own_file_names_its_model_type():
    types = {*LANGUAGE_TOWERS, *VISION_TOWERS, *FAMILIES, 'blip2'} - {their_family.MODEL_TYPE}
    # Sizes of published checkpoints, as their config.json has them; and a GGUF file's own name for a LLaMA.
    allowed = {'planning/published.py', 'checkpoints/gguf.py'}
    for file in PACKAGE.rglob('*.py'):
        name = file.relative_to(PACKAGE).as_posix()
        if name not in allowed and not name.startswith('models/'):
            named = types & set(strings(ast.parse(file.read_text())))
            assert not named, f'{name} names {named}'


def test_nobody_asks_which_class_a_config_has():
    question = re.compile(r'\b(isinstance|hasattr)\([^()]*(\.cfg|cfg\.|[A-Z]\w*Config\b)')
    for file in PACKAGE.rglob('*.py'):
        for line in file.read_text().splitlines():
            assert 'ConfigDict' in line or not question.search(line), f'{file}: {line}'


class Inheriting(LlavaFamily):
    """Changes the bridge, and leaves the config that leads to LLaVA's."""

    name = 'inheriting'

    def soft_words(self, w, cfg, batch, run):
        raise NotImplementedError


class ReturnsDict(LlavaFamily):
    def from_hf(self, hf):
        return vars(super().from_hf(hf))


class Failing(LlavaFamily):
    def from_hf(self, hf):
        return hf.no_such_field


INHERITING = Inheriting()
RETURNS_DICT = ReturnsDict()
FAILING = Failing()


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        (
            'INHERITING',
            'from_hf of family Inheriting returned a LlavaConfig, which does not lead back to the family',
        ),
        ('RETURNS_DICT', 'from_hf of family ReturnsDict returned a dict, which does not'),
        ('FAILING', 'from_hf of family Failing fails: AttributeError: .*no_such_field'),
    ],
)
def test_a_config_that_does_not_lead_back_to_its_family_is_refused(name, message, tmp_path):
    tiny_models.save('llava-default', tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        sl.load_model(tmp_path, family=f'{__name__}:{name}')
