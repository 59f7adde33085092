"""What a config says, as the library's own arguments; the configs themselves lie in `configs/`."""

import json
from pathlib import Path
from typing import Any

from sparselora_jax import pruning
from sparselora_jax.data.pipeline import TextFormat
from sparselora_jax.errors import SparseloraError
from sparselora_jax.sparsity import Pattern, parse_pattern
from sparselora_jax.storage import write_text
from sparselora_jax.weights import LoraSpec

TOWERS = ('vision', 'qformer', 'language')


class ConfigError(SparseloraError, ValueError):
    """A config that asks for what does not exist, or that is not the workdir's own."""


def prune_methods(config: Any) -> list[tuple[str, Any]]:
    """(regex, method) of each tower's blocks, by the name in `config.prune` and the tower's comparison group.

    Raises:
      ConfigError: an unknown method or group.
    """
    prune = config.prune
    methods = {
        'random': lambda group: pruning.Random(config.seed, group=group),
        'magnitude': lambda group: pruning.Magnitude(group=group),
        'wanda': lambda group: pruning.Wanda(group=group),
        'sparsegpt': lambda group: pruning.SparseGPT(
            damp=prune.damp, block=prune.block, group='block' if group == 'matrix' else group
        ),
    }
    if prune.method not in methods:
        raise ConfigError(f'prune.method {prune.method!r}: expected one of {", ".join(methods)}')
    for tower in TOWERS:
        if prune.group[tower] not in ('output', 'matrix'):
            raise ConfigError(f"prune.group.{tower} {prune.group[tower]!r}: expected 'output' or 'matrix'")
    make = methods[prune.method]
    return [(f'{tower}/blocks/.*', make(prune.group[tower])) for tower in TOWERS] + [('.*', make('output'))]


def prune_rules(config: Any) -> list[tuple[str, Pattern]]:
    """(regex, pattern) of each tower's blocks; everything else stays dense.

    Raises:
      PatternError: a pattern that does not parse.
    """
    patterns = [(f'{tower}/blocks/.*', parse_pattern(config.prune.pattern[tower])) for tower in TOWERS]
    return [*patterns, ('.*', Pattern())]


def lora_rules(config: Any) -> list[tuple[str, LoraSpec | None]]:
    """(regex, LoraSpec) of each tower's blocks; everything else is left alone."""
    lora = config.lora
    specs = {tower: LoraSpec(lora.rank[tower], lora.alpha[tower]) if lora.rank[tower] else None for tower in TOWERS}
    return [(f'{tower}/blocks/{lora.targets[tower]}', specs[tower]) for tower in TOWERS] + [('.*', None)]


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


def claim(workdir: Path, config: Any) -> None:
    """Makes the workdir this config's, or checks that it is.

    Raises:
      ConfigError: it holds the run of another config; names the fields that differ.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    kept, ours = workdir / 'config.json', json.loads(config.to_json())
    if kept.exists() and (found := _differences(ours, json.loads(kept.read_text()))):
        raise ConfigError(f'{workdir} holds the run of another config ({"; ".join(found)}); use another workdir')
    write_text(kept, json.dumps(ours, indent=1))
