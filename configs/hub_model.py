"""Define the defaults of recipes for a hub model and a folder of data, on top of `base.py`."""

from ml_collections import ConfigDict

from configs import base
from sparselora_jax.models.family import FAMILIES


def base_config(model: str, *, family: str) -> ConfigDict:
    """Return every field for a hub model, with the paper's evaluation: 5 beams, short answers.

    Args:
      model: hub id.
      family: transformers' `model_type`; models of other families are refused. The prompt is that of the family's
        processor. If the family lacks a tower, its fields are removed, so that setting one is an error.
    """
    config = base.base_config()
    config.model = model
    config.family = family
    config.data = 'data'
    known_family = FAMILIES.find(family)
    text = known_family.processor.text
    config.text = ConfigDict(
        {'prompt': text.prompt, 'prompt_tokens': text.prompt_tokens, 'answer_tokens': text.answer_tokens}
    )
    config.restore.batch = 16
    # Shares per kind of answer only exist for easy-VQA.
    config.restore.shares = ()
    config.evaluate.num_beams = 5
    config.evaluate.length_penalty = -1.0
    config.evaluate.max_new_tokens = 10
    for fields in (config.prune.pattern, config.prune.group, config.lora.rank, config.lora.alpha, config.lora.targets):
        for tower in set(fields) - set(known_family.tower_names):
            del fields[tower]
    return config
