"""What stands after the colon in `--config=configs/<name>.py:model=...,data=...,pattern=...,hardware=...`.

model: a Hugging Face directory or hub id; data: a folder with a `data.jsonl`; pattern: of the towers that the config
prunes (0.5 | 2:4 | 4:8); hardware: a name of `configs/hardware.py`. All are optional.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import hardware

NAMES = ('model', 'data', 'pattern', 'hardware')


def parse(arg: str | None) -> dict[str, str]:
    """`'model=a,pattern=2:4'` -> `{'model': 'a', 'pattern': '2:4'}`.

    Raises:
      ValueError: a name that is not one of `NAMES`, one given twice, or one without a value.
    """
    values: dict[str, str] = {}
    for part in (arg or '').split(',') if arg is not None else ():
        name, _, value = part.partition('=')
        if name not in NAMES or not value or name in values:
            expected = ', '.join(f'{name}=...' for name in NAMES)
            raise ValueError(f'config argument {part!r}: expected {expected}, each once')
        values[name] = value
    return values


def apply(config: ConfigDict, arg: str | None, *, pruned: Sequence[str]) -> ConfigDict:
    """The config with its arguments applied; the towers `pruned` get the pattern, the others stay dense.

    Raises:
      ValueError: see `parse`, or hardware that has no preset.
    """
    values = parse(arg)
    for tower in config.prune.pattern:
        config.prune.pattern[tower] = values.get('pattern', '2:4') if tower in pruned else 'dense'
    config.model = values.get('model', config.model)
    if 'data' in values:
        config.data = values['data']
        config.restore.shares = ()  # kinds of answers are easy-VQA's
        # easy-VQA's questions and answers are short.
        config.text.prompt_tokens = max(config.text.prompt_tokens, 32)
        config.text.answer_tokens = max(config.text.answer_tokens, 8)
        config.evaluate.max_new_tokens = max(config.evaluate.max_new_tokens, 10)
    if 'hardware' in values:
        if values['hardware'] not in hardware.PRESETS:
            raise ValueError(f'hardware {values["hardware"]!r}: expected one of {", ".join(hardware.PRESETS)}')
        config.update(hardware.PRESETS[values['hardware']])
    return config
