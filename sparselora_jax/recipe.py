"""What a config says, as the library's own arguments; the configs themselves lie in `configs/`."""

import json
from pathlib import Path
from typing import Any

from sparselora_jax import pruning
from sparselora_jax.errors import SparseloraError
from sparselora_jax.weights import LoraSpec

TOWERS = ('vision', 'qformer', 'language')


class ConfigError(SparseloraError, ValueError):
    """A config that asks for what does not exist, or that is not the workdir's own."""


def make_method(config: Any) -> Any:
    """The pruning method that `config.prune` names."""
    prune = config.prune
    methods = {
        'random': lambda: pruning.Random(config.seed),
        'magnitude': pruning.Magnitude,
        'wanda': pruning.Wanda,
        'sparsegpt': lambda: pruning.SparseGPT(damp=prune.damp, block=prune.block),
    }
    if prune.method not in methods:
        raise ConfigError(f'prune.method {prune.method!r}: expected one of {", ".join(methods)}')
    return methods[prune.method]()


def prune_rules(config: Any) -> list[tuple[str, str]]:
    """(regex, pattern) of each tower's blocks; everything else stays dense."""
    return [(f'{tower}/blocks/.*', config.prune.pattern[tower]) for tower in TOWERS] + [('.*', 'dense')]


def lora_rules(config: Any) -> list[tuple[str, LoraSpec | None]]:
    """(regex, LoraSpec) of each tower's blocks; everything else is left alone."""
    lora = config.lora
    specs = {tower: LoraSpec(lora.rank[tower], lora.alpha[tower]) if lora.rank[tower] else None for tower in TOWERS}
    return [(f'{tower}/blocks/.*', specs[tower]) for tower in TOWERS] + [('.*', None)]


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
    kept.write_text(json.dumps(ours, indent=1))
