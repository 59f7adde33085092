"""What the recipes of hub models with a folder of data share, beside `blip2_lang_only.base`."""

from ml_collections import ConfigDict

from configs import blip2_lang_only
from sparselora_jax.models.family import FAMILIES


def base(model: str, family: str) -> ConfigDict:
    """The fields of `blip2_lang_only` for a model of the hub, evaluated as the paper does: 5 beams, short answers.

    Args:
      family: transformers' `model_type`; its prompt is that of the family's processor.
    """
    config = blip2_lang_only.base()
    config.model = model
    config.data = 'data'
    known_family = FAMILIES.find(family)
    text = known_family.processor.text
    config.text = ConfigDict(
        {'prompt': text.prompt, 'prompt_tokens': text.prompt_tokens, 'answer_tokens': text.answer_tokens}
    )
    config.restore.batch = 16
    config.restore.shares = ()  # kinds of answers are easy-VQA's
    config.evaluate.num_beams = 5
    config.evaluate.length_penalty = -1.0
    config.evaluate.max_new_tokens = 10
    if 'qformer' not in known_family.tower_names:  # nothing is said of it
        for of in (config.prune.pattern, config.prune.group, config.lora.rank, config.lora.alpha, config.lora.targets):
            del of['qformer']
    return config
