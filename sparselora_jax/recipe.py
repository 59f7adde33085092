"""What a config says, as the library's own arguments; the configs themselves lie in `configs/`."""

import difflib
import json
import math
import textwrap
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from sparselora_jax import pruning
from sparselora_jax.data.easy_vqa import KINDS
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.models.model import Model
from sparselora_jax.models.runners import remat_blocks, scan_blocks
from sparselora_jax.restoration import guard
from sparselora_jax.restoration.losses import KL_REDUCTIONS
from sparselora_jax.restoration.restore import TRAINED, make_train_step, paper_optimizer
from sparselora_jax.runtime.errors import DataError, SparseloraError
from sparselora_jax.runtime.files import hold, write_text
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.packing import FORMATS, PackingError, find_format, format_for
from sparselora_jax.sparse.patterns import Pattern, PatternError, parse_pattern
from sparselora_jax.sparse.weights import GRADIENTS, LoraSpec

ALLOCATIONS = ('uniform', 'global_magnitude', 'owl', 'ecoflap_first', 'ecoflap_zeroth')
# How restoration holds pruned kernels, `restore.base`: as dense arrays; in the first packed format that takes a tower's
# pattern, rounded to four bits or not; or all of them in one format, for any pattern.
DENSE = 'dense'
BY_PATTERN = {'packed': False, 'packed_int4': True}  # whether values are rounded to four bits
BASES = (DENSE, *BY_PATTERN, *(name for name in FORMATS if not FORMATS.find(name).brings_mask))
TEACHERS = ('model', 'top_k')
DTYPES = ('float32', 'bfloat16', 'float16')
NO_RESULT = ('mesh', 'profile')  # fields that change none beyond rounding: a run goes on whatever they say
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
    _check_allocation(config)
    restore = config.restore
    fields = {'gradient': GRADIENTS, 'kl_reduction': KL_REDUCTIONS, 'trained': TRAINED}
    fields |= {'teacher': TEACHERS, 'on_bad_step': guard.POLICIES}
    _check_base(restore.base)
    for field, values in fields.items():
        if restore[field] not in values:
            raise ConfigError(f'restore.{field} {restore[field]!r}: expected one of {", ".join(values)}')
    if restore.spike != 0 and not restore.spike > 1:
        raise ConfigError(f'restore.spike {restore.spike}: expected more than 1 (times the usual loss), or 0')
    if not 0 <= config.prune.threshold < float('inf'):
        raise ConfigError(f'prune.threshold {config.prune.threshold}: expected 0 or more, per token')
    if restore.trained == 'weights':
        if all(parse_pattern(pattern).dense for pattern in config.prune.pattern.values()):
            raise ConfigError("restore.trained 'weights' trains pruned kernels: prune.pattern leaves every tower dense")
        if restore.base != 'dense':
            raise ConfigError(f"restore.base {restore.base!r} is frozen under LoRA; set restore.trained to 'lora'")
        if restore.control:
            raise ConfigError("restore.control: a LoRA budget on the dense model; set restore.trained to 'lora'")
    counts = {
        'prune': ('chunk', 'block', 'cycles', 'score_samples', 'score_batch'),
        'evaluate': ('questions', 'batch', 'max_new_tokens', 'num_beams'),
    }
    counts |= {'restore': ('steps', 'batch', 'checkpoint_every', 'top_k'), 'text': ('prompt_tokens', 'answer_tokens')}
    for part, fields in counts.items():
        for field in fields:
            if config[part][field] < 1:
                raise ConfigError(f'{part}.{field} {config[part][field]}: expected 1 or more')
    for tower in towers(config):
        if config.lora.rank[tower] < 0:
            raise ConfigError(f'lora.rank.{tower} {config.lora.rank[tower]}: expected 0 (leave it alone) or more')
    if config.dtype not in DTYPES:
        raise ConfigError(f'dtype {config.dtype!r}: expected one of {", ".join(DTYPES)}')
    try:
        text_format(config)
    except DataError as error:
        raise ConfigError(f'text.{error}') from None
    if config.evaluate.max_new_tokens < (longest := config.text.answer_tokens - 1):
        raise ConfigError(
            f'evaluate.max_new_tokens {config.evaluate.max_new_tokens}: answers of up to {longest} tokens '
            '(text.answer_tokens and the end) could not be right'
        )
    if config.stream and config.model == 'embedded':
        raise ConfigError('stream True: the embedded model is not read from disk; name a directory, :model=DIRECTORY')
    shares, kinds = restore.shares, KINDS if config.data == 'easy_vqa' else ()
    if shares and (len(shares) != len(kinds) or min(shares) < 0 or not sum(shares)):
        expected = f'a share of each kind: {", ".join(kinds)}' if kinds else 'none, () (only easy_vqa has kinds)'
        raise ConfigError(f'restore.shares {shares}: expected {expected}')
    if restore.accumulate < 1 or restore.batch % restore.accumulate:
        raise ConfigError(f'restore.accumulate {restore.accumulate}: does not divide restore.batch, {restore.batch}')


def _check_base(base: str) -> None:
    """Check that `restore.base` is one of `BASES`, or a format of somebody else's, as `package.module:Name`."""
    if base in BASES:
        return
    try:
        if ':' in base:
            find_format(base)
            return
    except PackingError as error:
        raise ConfigError(f'restore.base: {error}') from None
    raise ConfigError(f'restore.base {base!r}: expected one of {", ".join(BASES)}, or package.module:Name')


def check_batches(config: Any) -> None:
    """Names batches that the mesh cannot split.

    Raises:
      ConfigError: the field, what does not divide it, and the nearest mesh of as many devices that splits all.
    """
    mesh, restore, prune = config.mesh, config.restore, config.prune
    rows, counts = mesh.data * mesh.fsdp, {'restore.batch / restore.accumulate': restore.batch // restore.accumulate}
    counts['prune.samples'] = prune.samples
    if prune.allocation.startswith('ecoflap'):
        counts['prune.score_batch'] = prune.score_batch
    for field, count in counts.items():
        if count % rows:
            fits = math.gcd(rows, *counts.values())
            fsdp = math.gcd(mesh.fsdp, fits)
            better = f'data={fits // fsdp}, fsdp={fsdp}, tensor={mesh.tensor * rows // fits}'
            raise ConfigError(
                f'{field} is {count}: mesh.data * mesh.fsdp = {rows} does not divide it; {better} divides all, or ask '
                f'for a multiple of {rows}'
            )


def _check_allocation(config: Any) -> None:
    prune = config.prune
    if prune.allocation not in ALLOCATIONS:
        raise ConfigError(f'prune.allocation {prune.allocation!r}: expected one of {", ".join(ALLOCATIONS)}')
    if prune.allocation == 'uniform':
        return
    for tower in towers(config):
        if parse_pattern(prune.pattern[tower]).structured:
            found = f'prune.pattern.{tower} {prune.pattern[tower]!r} with prune.allocation {prune.allocation!r}'
            raise PatternError(
                f"{found}: N:M leaves nothing to allocate; expected a sparsity such as 0.5, or 'uniform'"
            )
    if not 0 < prune.highest <= 1:
        raise ConfigError(f'prune.highest {prune.highest}: expected a sparsity in (0, 1]')
    for field in ('noise', 'outlier', 'spread'):
        if not prune[field] > 0:
            raise ConfigError(f'prune.{field} {prune[field]}: expected more than 0')
    if prune.score_samples % prune.score_batch:
        found = f'prune.score_batch {prune.score_batch}: does not divide prune.score_samples'
        raise ConfigError(f'{found}, {prune.score_samples}')
    if config.stream and prune.allocation.startswith('ecoflap'):
        expected = 'whose scores need the model in memory; with it, use global_magnitude or owl'
        raise ConfigError(f'stream with prune.allocation {prune.allocation!r}, {expected}')


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


def rounded_rules(config: ConfigDict) -> list[tuple[str, Pattern]]:
    """Return (regex, pattern) of the kernels that `restore.base` rounds, everything else dense.

    Args:
      config: the recipe.

    Returns:
      Ordered rules; empty where nothing is rounded.
    """
    rounded = [
        (regex, pattern if form is not None and find_format(form).levels is not None else Pattern())
        for regex, pattern, form in _base_rules(config)
    ]
    return rounded if any(not pattern.dense for _, pattern in rounded) else []


def rounded_format(config: ConfigDict) -> str:
    """Return the name of the format whose levels the kernels of `rounded_rules` are rounded to.

    Args:
      config: the recipe; `restore.base` rounds some of its kernels.
    """
    names = (form for _, _, form in _base_rules(config) if form is not None)
    return next(name for name in names if find_format(name).levels is not None)


def pack_formats(config: ConfigDict, *, four_bits: bool) -> list[tuple[str, str]]:
    """Return (regex, format of `packing.pack`) of each pruned tower: the first format that takes its pattern.

    Args:
      config: the recipe.
      four_bits: round values to four bits where a format for the pattern does.
    """
    patterns = {tower: parse_pattern(config.prune.pattern[tower]) for tower in towers(config)}
    return [
        (f'{tower}/.*', format_for(pattern, four_bits=four_bits))
        for tower, pattern in patterns.items()
        if not pattern.dense
    ]


def base_formats(config: ConfigDict) -> str | list[tuple[str, str]] | None:
    """Return the formats in which restoration holds pruned kernels, see `packing.reduce_kernels`.

    Args:
      config: the recipe.

    Returns:
      The name of one format, or rules (regex, name); None: kernels stay dense arrays.
    """
    base = config.restore.base
    if base == DENSE:
        return None
    return pack_formats(config, four_bits=BY_PATTERN[base]) if base in BY_PATTERN else base


def _base_rules(config: ConfigDict) -> list[tuple[str, Pattern, str | None]]:
    """Return (regex, pattern, the format of `restore.base` for this pattern or None: a dense array)."""
    base = config.restore.base
    rules = []
    for regex, pattern in prune_rules(config):
        form = base
        if pattern.dense or base == DENSE:
            form = None
        elif base in BY_PATTERN:
            form = format_for(pattern, four_bits=BY_PATTERN[base])
        rules.append((regex, pattern, form))
    return rules


def runs_teacher(config: Any) -> bool:
    """Whether restoration runs the dense model beside the student."""
    return bool(config.restore.kd) and config.restore.teacher == 'model'


def reads_teacher(config: Any) -> bool:
    """Whether restoration reads what an earlier stage kept of the dense model's logits."""
    return bool(config.restore.kd) and config.restore.teacher == 'top_k'


def lora_rules(config: Any) -> list[tuple[str, LoraSpec | None]]:
    """(regex, LoraSpec) of each tower's blocks; everything else is left alone."""
    lora = config.lora
    specs = {tower: LoraSpec(rank, lora.alpha[tower]) if rank else None for tower, rank in lora.rank.items()}
    return [(f'{tower}/{BLOCKS}{lora.targets[tower]}', specs[tower]) for tower in towers(config)] + [('.*', None)]


def check_allocation(config: Any, params: dict) -> None:
    """Names an allocation that is impossible whatever the scores.

    Args:
      params: anything with the shapes of a params tree.

    Raises:
      PatternError: no zeros to allocate, more than `prune.highest` allows, or ratios of OWL that may leave (0, 1).
    """
    prune = config.prune
    if prune.allocation == 'uniform':
        return
    uniform = pruning.uniform_zeros(params, prune_rules(config), method=prune_methods(config))
    sizes = pruning.kernel_sizes(params, uniform)
    if prune.allocation != 'owl':
        try:
            pruning.check_bound(uniform, sizes, prune.highest)
        except PatternError as error:
            raise PatternError(f'prune.highest: {error}') from None
    for path, zeros in uniform.items() if prune.allocation == 'owl' else ():
        ratio = zeros.max() / sizes[path]
        if not prune.spread < ratio < 1 - prune.spread:
            raise PatternError(
                f'{path}: sparsity {ratio:.3f} with prune.spread {prune.spread}: '
                'OWL moves ratios by as much, and they must stay between 0 and 1; ask for a smaller spread'
            )


def field_names(config: Any, prefix: str = '') -> list[str]:
    """The dotted names of all fields, those of parts included: `restore`, `restore.steps`."""
    found = []
    for name, value in config.items():
        found.append(prefix + name)
        if isinstance(value, ConfigDict):
            found += field_names(value, f'{prefix}{name}.')
    return found


def override(config: ConfigDict, fields: dict[str, Any], *, of: str = 'config') -> None:
    """Sets fields by their dotted names.

    Args:
      of: whose fields they are, for the error.

    Raises:
      ConfigError: a field that does not exist, with the nearest one, or a value of another type.
    """
    known = field_names(config)
    for name, value in fields.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, cutoff=0.0)
            raise ConfigError(f'{of} has no field {name!r}; did you mean {nearest[0]!r}?')
        try:
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError) as error:
            raise ConfigError(f'{of}: {name} cannot be {value!r} ({error})') from None


def text_format(config: Any) -> TextFormat:
    """How questions become tokens, and how answers are generated."""
    return TextFormat(**config.text.to_dict(), decoding=decoding(config))


def decoding(config: Any) -> dict[str, Any]:
    """Arguments of `generate`."""
    return {name: value for name, value in config.evaluate.to_dict().items() if name not in ('questions', 'batch')}


def _differences(ours: dict, theirs: dict, prefix: str = '') -> list[str]:
    found = []
    for name in sorted((ours.keys() | theirs.keys()) - set(NO_RESULT)):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f'{prefix}{name}.')
        elif a != b:
            here, there = (textwrap.shorten(repr(value), 60, placeholder=' ...') for value in (a, b))
            found.append(f'{prefix}{name} is {here} here and {there} there')
    return found


def refuse_other(workdir: Path, config: Any) -> None:
    """Checks that a workdir is this config's, or nobody's yet.

    The mesh may be another: what was saved on one is read on any.

    Raises:
      ConfigError: it holds the run of another config; names the fields that differ.
    """
    kept, ours = workdir / 'config.json', json.loads(config.to_json())
    theirs = json.loads(kept.read_text()) if kept.exists() else ours
    if found := _differences(ours, theirs):
        raise ConfigError(f'{workdir} holds the run of another config ({"; ".join(found)}); use another workdir')


def claim(workdir: Path, config: Any) -> None:
    """Makes the workdir this config's, and keeps other processes out of it until this one ends.

    Raises:
      StorageError: another run is in it. ConfigError: see `refuse_other`. What it holds stays then.
    """
    hold(workdir)
    refuse_other(workdir, config)  # another run may have come and gone since it was looked at
    write_text(workdir / 'config.json', json.dumps(json.loads(config.to_json()), indent=1))


def restore_program(model: Model, config: Any, mesh: Mesh | AbstractMesh | None) -> tuple[Any, Any]:
    """(the jitted step of restoration, its optimizer), as a recipe asks for them.

    Args:
      mesh: where its arguments will lie; None: on one device.
    """
    knobs = config.restore
    schedule = ('peak', 'warmup', 'start', 'end', 'weight_decay', 'clip')
    tx = paper_optimizer(knobs.steps, **{name: knobs[name] for name in schedule})
    if knobs.on_bad_step == 'skip' or knobs.spike:
        tx = guard.skip_bad_steps(tx, spike=knobs.spike or None)
    run = remat_blocks if knobs.remat else scan_blocks
    loss = ('kd', 'temperature', 'kl_reduction', 'gradient', 'accumulate', 'trained')
    loss = {name: knobs[name] for name in loss}
    if mesh is None:
        return make_train_step(lambda w, batch: model.answer_logits(w, batch, run), tx, **loss), tx

    def forward(weights, batch):
        weights = sharding.gather_outside_blocks(weights, mesh)
        return model.answer_logits(weights, batch, sharding.gathering(run, mesh))

    return make_train_step(forward, tx, **loss, parts=sharding.row_parts(mesh)), tx
