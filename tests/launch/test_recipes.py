"""The recipes of configs/: variants of a family differ in what they prune alone, and none has a field of its own."""

import importlib
import json

import pytest

from configs.base import base_config
from sparselora_jax import recipe
from sparselora_jax.checkpoints import embedded
from sparselora_jax.models import family as families
from sparselora_jax.runtime.errors import UnsupportedModelError

FAMILIES = ('blip2', 'instructblip', 'llava', 'paligemma')
PRUNED = {'lang_only': {'language'}, 'vision_only': {'vision'}, 'both': {'vision', 'language'}}


def fields(config):
    return json.loads(config.to_json())


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('arg', [None, 'model=m,data=d,pattern=4:8,hardware=8gpu'])
def test_variants_of_a_family_differ_in_what_they_prune_alone(family, arg):
    others = []
    for variant, towers in PRUNED.items():
        config = fields(importlib.import_module(f'configs.{family}_{variant}').get_config(arg))
        patterns = config['prune'].pop('pattern')
        assert {tower for tower, pattern in patterns.items() if pattern != 'dense'} == towers
        assert {patterns[tower] for tower in towers} == {'4:8' if arg else '2:4'}
        others.append(config)
    assert others[0] == others[1] == others[2]


@pytest.mark.parametrize('family', FAMILIES)
def test_a_recipe_has_the_fields_of_the_base_but_for_towers_that_it_lacks(family):
    config = importlib.import_module(f'configs.{family}_lang_only').get_config()
    missing = set(recipe.field_names(base_config())) - set(recipe.field_names(config))
    assert not set(recipe.field_names(config)) - set(recipe.field_names(base_config()))
    assert {name.rsplit('.')[-1] for name in missing} <= {'qformer'}


def test_the_first_recipe_is_the_base_with_its_language_tower_pruned():
    from configs import blip2_lang_only

    # The base takes a model of any family; a recipe of a family names it.
    assert fields(blip2_lang_only.get_config()) == fields(base_config()) | {'family': 'blip-2'}


@pytest.mark.parametrize('name', [f'{family}_{variant}' for family in FAMILIES for variant in PRUNED])
@pytest.mark.parametrize('model_type', families.FAMILIES)
def test_a_recipe_takes_models_of_its_own_family_alone(name, model_type):
    config = importlib.import_module(f'configs.{name}').get_config()
    own = families.FAMILIES.find(model_type)
    if name.startswith(f'{own.name}_'):
        assert families.find_family(model_type, config.family) is own
        return
    with pytest.raises(UnsupportedModelError, match=f'of the family {own.name}, not {name.split("_")[0]}: '):
        families.find_family(model_type, config.family)


@pytest.mark.parametrize('name', [f'{family}_{variant}' for family in FAMILIES for variant in PRUNED])
def test_only_a_recipe_of_blip2_takes_the_embedded_model(name):
    config = importlib.import_module(f'configs.{name}').get_config('model=embedded')
    if name.startswith('blip2_'):
        recipe.check_family(config, embedded.load_config())
        return
    with pytest.raises(recipe.ConfigError, match=r'embedded: .* family blip2, not .*/blip2_lang_only\.py$'):
        recipe.check_family(config, embedded.load_config())


@pytest.mark.parametrize('family', FAMILIES)
def test_a_recipe_named_for_one_tower_says_that_lora_is_trained_in_all(family):
    module = importlib.import_module(f'configs.{family}_lang_only')
    assert all(module.get_config().lora.rank.values())
    assert 'LoRA is trained in all towers, also vision' in module.__doc__
