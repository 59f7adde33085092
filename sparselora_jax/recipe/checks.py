"""Check the values of a recipe before any work begins."""

import math
import re

from ml_collections import ConfigDict

from sparselora_jax.checkpoints import embedded
from sparselora_jax.data.loaders import is_path
from sparselora_jax.data.sources.place import split_names
from sparselora_jax.models.config import FamilyConfig
from sparselora_jax.models.family import other_family, use_recipe_of
from sparselora_jax.pruning.reconstruct import ReconstructError, check_reconstruct
from sparselora_jax.recipe.config import ConfigError, field_names, towers
from sparselora_jax.recipe.fields import check_fields, check_names
from sparselora_jax.recipe.kernel_rules import BASES, prune_rules, rounded_rules
from sparselora_jax.recipe.methods import (
    allocation_of,
    check_allocation_fields,
    option_fields,
    prune_methods,
    reconstruction,
)
from sparselora_jax.recipe.questions import data_loader, metric, task_names, text_format
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.sparse.packing import PackingError, find_format
from sparselora_jax.sparse.patterns import parse_pattern


def check_values(config: ConfigDict) -> None:
    """Check everything that can be checked without the model and the data.

    Args:
      config: a recipe.

    Raises:
      ConfigError, PatternError: a value is illegal; the message names the field, its value and what is expected.
    """
    # Fields and towers are checked first: the later checks rely on the types of values and on the names of towers.
    check_fields(config)
    check_names(field_names(config), option_fields(config))
    _check_towers(config)
    # Called only for their errors; their results are computed again where they are used.
    prune_methods(config)
    prune_rules(config)
    check_allocation_fields(config)
    _check_base(config)
    _check_samples(config)
    _check_reconstruction(config)
    _check_lora(config)
    _check_trained_weights(config)
    _check_text(config)
    _check_shares(config)
    _check_mixture(config)
    # Also only for their errors.
    metric(config)
    task_names(config)
    if config.stream and config.model == embedded.NAME:
        raise ConfigError('stream True: the embedded model is not read from disk; name a directory, :model=DIRECTORY')
    restore = config.restore
    if restore.batch % restore.accumulate:
        raise ConfigError(f'restore.accumulate {restore.accumulate}: does not divide restore.batch, {restore.batch}')


def _check_base(config: ConfigDict) -> None:
    """Check that `restore.base` is one of `BASES`, or a format that takes every tower's pattern."""
    base = config.restore.base
    if base in BASES:
        return
    try:
        form = find_format(base)
    except PackingError as error:
        raise ConfigError(f'restore.base: {error}') from None
    for tower, text in config.prune.pattern.items():
        pattern = parse_pattern(text)
        if not pattern.dense and not form.takes(pattern):
            raise ConfigError(f'restore.base {base!r} cannot hold prune.pattern.{tower} {text!r}')


def _check_towers(config: ConfigDict) -> None:
    """Check that all fields that have a value per tower name the same towers."""
    for by_tower in (config.prune.group, config.lora.rank, config.lora.alpha, config.lora.targets):
        # A tower that is missing from one field would raise a KeyError much later.
        not_in_both = set(by_tower) ^ set(towers(config))
        if not_in_both:
            raise ConfigError(
                f'tower {min(not_in_both)!r}: named in some of prune.pattern, prune.group, lora.*, but not in all'
            )


def _check_samples(config: ConfigDict) -> None:
    """Check that there are calibration samples if anything is calibrated on them."""
    prune = config.prune
    if prune.samples > 0:
        return
    # One method for each tower, and a last one for the kernels outside the blocks, which stay dense.
    methods = dict(zip(towers(config), prune_methods(config), strict=False))
    users = [
        f'prune.method {prune.method!r}'
        for tower, (_, method) in methods.items()
        if method.statistic is not None and not parse_pattern(prune.pattern[tower]).dense
    ]
    if allocation_of(config).uses_calibration:
        users.append(f'prune.allocation {prune.allocation!r}')
    if rounded_rules(config):
        users.append(f'restore.base {config.restore.base!r}')
    if reconstruction(config):
        users.append(f'prune.reconstruct.passes {prune.reconstruct.passes}')
    if users:
        raise ConfigError(f'prune.samples {prune.samples}: expected 1 or more, because {users[0]} needs them')


def _check_reconstruction(config: ConfigDict) -> None:
    """Check the batch of reconstruction; `check_batches` checks that the mesh divides it."""
    at_once = config.prune.chunk * config.mesh.data * config.mesh.fsdp
    try:
        check_reconstruct(reconstruction(config), at_once, 1)
    except ReconstructError as error:
        raise ConfigError(f'prune.{error}') from None


def _check_lora(config: ConfigDict) -> None:
    """Check the regexes of every tower."""
    for tower in towers(config):
        targets = config.lora.targets[tower]
        try:
            # Compiled inside a group, as in `lora_rules`: '(?i)q' compiles alone, but not inside a group.
            re.compile(f'(?:{targets})')
        except re.error as error:
            raise ConfigError(f'lora.targets.{tower} {targets!r}: expected a regular expression ({error})') from None


def _check_trained_weights(config: ConfigDict) -> None:
    """Check that no field requires LoRA if the pruned kernels themselves are trained."""
    restore = config.restore
    if restore.trained != 'weights':
        return
    if all(parse_pattern(pattern).dense for pattern in config.prune.pattern.values()):
        raise ConfigError("restore.trained 'weights' trains pruned kernels: prune.pattern leaves every tower dense")
    if restore.base != 'dense':
        raise ConfigError(f"restore.base {restore.base!r} is frozen under LoRA; set restore.trained to 'lora'")
    if config.lora.dropout:
        raise ConfigError(f"lora.dropout {config.lora.dropout} drops inputs of LoRA; set restore.trained to 'lora'")
    if restore.control:
        raise ConfigError("restore.control trains LoRA on the dense model; set restore.trained to 'lora'")


def _check_text(config: ConfigDict) -> None:
    """Check the prompt's template, and that generated answers can be as long as the longest answer."""
    try:
        text_format(config)
    except DataError as error:
        # The message begins with the field: "prompt 'Question:': expected {} once".
        raise ConfigError(f'text.{error}') from None
    # The last token of an answer is the end of text, which a right answer need not contain.
    longest_answer = config.text.answer_tokens - 1
    if config.evaluate.max_new_tokens < longest_answer:
        raise ConfigError(
            f'evaluate.max_new_tokens {config.evaluate.max_new_tokens}: answers of up to {longest_answer} tokens '
            '(text.answer_tokens without the end) would be cut off'
        )


def _check_shares(config: ConfigDict) -> None:
    """Check that `restore.shares` has a share for each kind of answer in the data set."""
    shares = config.restore.shares
    # The loader is always looked up, so that an unknown data set is an error even without shares.
    kinds = data_loader(config).kinds
    if config.prune.data:
        data_loader(config, 'prune.data')
    if not shares:
        return
    if not kinds:
        raise ConfigError(
            f'restore.shares {shares}: expected (), because the kinds of answers of {config.data!r} are not known; '
            f'name the data in the argument of a recipe, --config=configs/NAME.py:data={config.data}, which sets this '
            'and the lengths of texts'
        )
    if len(shares) != len(kinds) or sum(shares) == 0:
        raise ConfigError(f'restore.shares {shares}: expected a share of each kind: {", ".join(kinds)}')


def _check_mixture(config: ConfigDict) -> None:
    """Check that records are drawn from sources, and that each source has a weight."""
    samples = config.mixture.samples
    weights = config.mixture.weights
    if not is_path(config.data):
        if samples or weights:
            field = 'samples' if samples else 'weights'
            raise ConfigError(
                f'mixture.{field} {config.mixture[field]}: expected {0 if samples else ()}, because {config.data!r} is '
                'not read from files of your own'
            )
        return
    sources = len(split_names(config.data))
    if weights and len(weights) != sources:
        raise ConfigError(f'mixture.weights {weights}: expected a weight for each of the {sources} sources of data')
    if weights and not samples:
        raise ConfigError(f'mixture.weights {weights}: expected (), or a number of records as mixture.samples')


def check_family(config: ConfigDict, cfg: FamilyConfig) -> None:
    """Check that a recipe is for its model's family, and has values for exactly the family's towers.

    Args:
      config: a recipe.
      cfg: our config of the model.

    Raises:
      ConfigError: it is for another family, or has other towers; names the family and its towers.
    """
    family = cfg.family
    if problem := other_family(family, config.family):
        raise ConfigError(f'{config.model}: a model {problem}')
    if set(towers(config)) != set(family.tower_names):
        raise ConfigError(
            f'{config.model}: a {family.name} model, with the towers {", ".join(family.tower_names)}; this recipe is '
            f'for {", ".join(towers(config))}: {use_recipe_of(family)}'
        )


def check_batches(config: ConfigDict) -> None:
    """Check that the mesh divides the batches.

    Args:
      config: a recipe.

    Raises:
      ConfigError: it does not; the message names the field, and the nearest mesh with as many devices that divides all.
    """
    mesh = config.mesh
    rows = mesh.data * mesh.fsdp  # both axes split a batch
    counts = {
        'restore.batch / restore.accumulate': config.restore.batch // config.restore.accumulate,
        'prune.samples': config.prune.samples,
    }
    if reconstruction(config):
        counts['prune.reconstruct.batch'] = config.prune.reconstruct.batch
    # Some allocations compute the loss on their own batches.
    if allocation_of(config).uses_score_batches:
        counts['prune.score_batch'] = config.prune.score_batch
    for field, count in counts.items():
        if count % rows == 0:
            continue
        # The same number of devices, but fewer along the axes that split batches.
        best_rows = math.gcd(rows, *counts.values())
        fsdp = math.gcd(mesh.fsdp, best_rows)
        better = f'data={best_rows // fsdp}, fsdp={fsdp}, tensor={mesh.tensor * rows // best_rows}'
        raise ConfigError(
            f'{field} is {count}: mesh.data * mesh.fsdp = {rows} does not divide it; {better} divides all, or ask '
            f'for a multiple of {rows}'
        )
