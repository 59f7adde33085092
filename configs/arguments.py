"""Parse the arguments of a recipe: the text after the colon in `--config=configs/NAME.py:model=...,data=...`.

- `model`: a Hugging Face directory or hub id.
- `data`: a file or a folder of images and texts, such as a folder with a `data.jsonl`.
- `pattern`: the pattern of the towers that the recipe prunes: a sparsity such as 0.5, or N:M such as 2:4.
- `hardware`: a preset of `configs/hardware.py`.

All arguments are optional.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import hardware

NAMES = ('model', 'data', 'pattern', 'hardware')


def parse(arg: str | None) -> dict[str, str]:
    """Return the arguments by name.

    Raises:
      ValueError: a name that is not one of `NAMES`, one given twice, or one without a value.

    >>> parse('model=a,pattern=2:4')
    {'model': 'a', 'pattern': '2:4'}
    """
    values: dict[str, str] = {}
    if arg is None:
        return values
    # An empty text, as in `--config=FILE:`, counts as an argument without a name and is refused.
    for part in arg.split(','):
        name, _, value = part.partition('=')
        if name not in NAMES or not value or name in values:
            expected = ', '.join(f'{name}=...' for name in NAMES)
            hint = '' if '=' in part else '; a path with a comma goes into --config.data=PATH or --config.model=PATH'
            raise ValueError(f'config argument {part!r}: expected {expected}, each once{hint}')
        values[name] = value
    return values


def apply(config: ConfigDict, arg: str | None, *, pruned: Sequence[str]) -> ConfigDict:
    """Set the fields that the arguments determine, and return the config.

    Args:
      config: a recipe; changed in place.
      arg: text after the colon; see the module's docstring.
      pruned: the towers that get the pattern; the others stay dense.

    Raises:
      ValueError: see `parse`; or no preset has the name of the hardware.
    """
    values = parse(arg)
    pattern = values.get('pattern', '2:4')
    for tower in config.prune.pattern:
        config.prune.pattern[tower] = pattern if tower in pruned else 'dense'
    config.model = values.get('model', config.model)
    if 'data' in values:
        config.data = values['data']
        # Shares per kind of answer only exist for easy-VQA.
        config.restore.shares = ()
        # The defaults are too small for other data: easy-VQA's questions and answers are short.
        config.text.prompt_tokens = max(config.text.prompt_tokens, 32)
        config.text.answer_tokens = max(config.text.answer_tokens, 8)
        config.evaluate.max_new_tokens = max(config.evaluate.max_new_tokens, 10)
    if 'hardware' in values:
        name = values['hardware']
        if name not in hardware.PRESETS:
            raise ValueError(f'hardware {name!r}: expected one of {", ".join(hardware.PRESETS)}')
        config.update(hardware.PRESETS[name])
    return config
