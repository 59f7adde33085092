"""What the recipes of hub models with a folder of data share, beside `blip2_lang_only.base`."""

from ml_collections import ConfigDict

from configs import blip2_lang_only


def base(model: str, *, prompt: str, prompt_tokens: int, qformer: bool) -> ConfigDict:
    """The fields of `blip2_lang_only` for a model of the hub, evaluated as the paper does: 5 beams, short answers.

    Args:
      prompt: the template around a record's prompt; `prompt_tokens` is room for both.
      qformer: whether the model has one; without it nothing of the recipe is said of it.
    """
    config = blip2_lang_only.base()
    config.model = model
    config.data = 'data'
    config.text = ConfigDict(dict(prompt=prompt, prompt_tokens=prompt_tokens, answer_tokens=8))
    config.restore.shares = ()  # kinds of answers are easy-VQA's
    config.evaluate.num_beams = 5
    config.evaluate.length_penalty = -1.0
    if not qformer:
        for of in (config.prune.pattern, config.prune.group, config.lora.rank, config.lora.alpha, config.lora.targets):
            del of['qformer']
    return config
