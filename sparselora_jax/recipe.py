"""What a config says, as the library's own arguments; the configs themselves lie in `configs/`."""

import json
from pathlib import Path
from typing import Any

from sparselora_jax import pruning
from sparselora_jax.data.easy_vqa import KINDS
from sparselora_jax.data.pipeline import TextFormat
from sparselora_jax.errors import SparseloraError
from sparselora_jax.losses import KL_REDUCTIONS
from sparselora_jax.sparsity import Pattern, PatternError, parse_pattern
from sparselora_jax.storage import write_text
from sparselora_jax.weights import GRADIENTS, LoraSpec

DTYPES = ('float32', 'bfloat16', 'float16')
BLOCKS = '(.*/)?blocks/'  # below a tower's name: T5 has an encoder's and a decoder's


class ConfigError(SparseloraError, ValueError):
    """A config that asks for what does not exist, or that is not the workdir's own."""


def check_values(config: Any) -> None:
    """Names what cannot work whatever the model, before anything is loaded.

    Raises:
      ConfigError, PatternError: the field, its value and what is expected.
    """
    for part in (config.prune.group, config.lora.rank, config.lora.alpha, config.lora.targets):
        if odd := set(part) ^ set(towers(config)):
            raise ConfigError(
                f'tower {sorted(odd)[0]!r}: named in one of prune.pattern, prune.group, lora.*, not in all'
            )
    prune_methods(config)
    prune_rules(config)
    restore = config.restore
    for field, values in {'gradient': GRADIENTS, 'kl_reduction': KL_REDUCTIONS}.items():
        if restore[field] not in values:
            raise ConfigError(f'restore.{field} {restore[field]!r}: expected one of {", ".join(values)}')
    if not 0 <= config.prune.threshold < float('inf'):
        raise ConfigError(f'prune.threshold {config.prune.threshold}: expected 0 or more, per token')
    counts = {'prune': ('chunk', 'block', 'cycles'), 'evaluate': ('questions', 'batch', 'max_new_tokens', 'num_beams')}
    counts |= {'restore': ('steps', 'batch', 'checkpoint_every'), 'text': ('prompt_tokens', 'answer_tokens')}
    for part, fields in counts.items():
        for field in fields:
            if config[part][field] < 1:
                raise ConfigError(f'{part}.{field} {config[part][field]}: expected 1 or more')
    for tower in towers(config):
        if config.lora.rank[tower] < 0:
            raise ConfigError(f'lora.rank.{tower} {config.lora.rank[tower]}: expected 0 (leave it alone) or more')
    if config.dtype not in DTYPES:
        raise ConfigError(f'dtype {config.dtype!r}: expected one of {", ".join(DTYPES)}')
    if config.text.prompt.replace('{}', '', 1).count('{') or '{}' not in config.text.prompt:
        raise ConfigError(f'text.prompt {config.text.prompt!r}: expected one {{}}, for the question')
    shares, kinds = restore.shares, KINDS if config.data == 'easy_vqa' else ()
    if shares and (len(shares) != len(kinds) or min(shares) < 0 or not sum(shares)):
        expected = f'a share of each kind: {", ".join(kinds)}' if kinds else 'none, () (only easy_vqa has kinds)'
        raise ConfigError(f'restore.shares {shares}: expected {expected}')
    if restore.accumulate < 1 or restore.batch % restore.accumulate:
        raise ConfigError(f'restore.accumulate {restore.accumulate}: does not divide restore.batch, {restore.batch}')


def towers(config: Any) -> tuple[str, ...]:
    """The towers that the config speaks of."""
    return tuple(config.prune.pattern)


def prune_methods(config: Any) -> list[tuple[str, Any]]:
    """(regex, method) of each tower's blocks, by the name in `config.prune` and the tower's comparison group.

    Raises:
      ConfigError: an unknown method, initial method or group.
    """
    prune = config.prune
    initial = {
        'random': lambda group: pruning.Random(config.seed, group=group),
        'magnitude': lambda group: pruning.Magnitude(group=group),
        'wanda': lambda group: pruning.Wanda(group=group),
        'sparsegpt': lambda group: pruning.SparseGPT(
            damp=prune.damp, block=prune.block, group='block' if group == 'matrix' else group
        ),
    }
    if prune.initial not in initial:
        raise ConfigError(f'prune.initial {prune.initial!r}: expected one of {", ".join(initial)}')
    methods = initial | {
        'dsnot': lambda group: pruning.DSnoT(initial[prune.initial](group), prune.cycles, prune.threshold)
    }
    if prune.method not in methods:
        raise ConfigError(f'prune.method {prune.method!r}: expected one of {", ".join(methods)}')
    for tower in towers(config):
        if prune.group[tower] not in ('output', 'matrix'):
            raise ConfigError(f"prune.group.{tower} {prune.group[tower]!r}: expected 'output' or 'matrix'")
    make = methods[prune.method]
    groups = [(f'{tower}/{BLOCKS}.*', make(prune.group[tower])) for tower in towers(config)]
    return [*groups, ('.*', make('output'))]


def prune_rules(config: Any) -> list[tuple[str, Pattern]]:
    """(regex, pattern) of each tower's blocks; everything else stays dense.

    Raises:
      PatternError: a pattern that does not parse.
    """
    rules = []
    for tower in towers(config):
        try:
            rules.append((f'{tower}/{BLOCKS}.*', parse_pattern(config.prune.pattern[tower])))
        except PatternError as error:
            raise PatternError(f'prune.pattern.{tower}: {error}') from None
    return [*rules, ('.*', Pattern())]


def lora_rules(config: Any) -> list[tuple[str, LoraSpec | None]]:
    """(regex, LoraSpec) of each tower's blocks; everything else is left alone."""
    lora = config.lora
    specs = {tower: LoraSpec(rank, lora.alpha[tower]) if rank else None for tower, rank in lora.rank.items()}
    return [(f'{tower}/{BLOCKS}{lora.targets[tower]}', specs[tower]) for tower in towers(config)] + [('.*', None)]


def text_format(config: Any) -> TextFormat:
    """How questions become tokens."""
    return TextFormat(**config.text.to_dict())


def _differences(ours: dict, theirs: dict, prefix: str = '') -> list[str]:
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f'{prefix}{name}.')
        elif a != b:
            found.append(f'{prefix}{name} is {a!r} here and {b!r} there')
    return found


def refuse_other(workdir: Path, config: Any) -> None:
    """Checks that a workdir is this config's, or nobody's yet.

    Raises:
      ConfigError: it holds the run of another config; names the fields that differ.
    """
    kept = workdir / 'config.json'
    if kept.exists() and (found := _differences(json.loads(config.to_json()), json.loads(kept.read_text()))):
        raise ConfigError(f'{workdir} holds the run of another config ({"; ".join(found)}); use another workdir')


def claim(workdir: Path, config: Any) -> None:
    """Makes the workdir this config's."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(workdir / 'config.json', json.dumps(json.loads(config.to_json()), indent=1))
