"""Turn a recipe into rules for kernels: patterns, LoRA, and formats of the base."""

import re

from ml_collections import ConfigDict

from sparselora_jax.recipe.config import ConfigError, towers
from sparselora_jax.sparse.packing import FORMATS, find_format, format_for
from sparselora_jax.sparse.patterns import Pattern, PatternError, parse_pattern
from sparselora_jax.sparse.rules import block_rule, kernels, name_in_block
from sparselora_jax.sparse.weights import LoraSpec

# Values of `restore.base`, the format of pruned kernels in restoration: dense arrays; the first packed format that
# supports a tower's pattern, with or without rounding to four bits; or one named format for all towers.
DENSE = 'dense'
BY_PATTERN = {'packed': False, 'packed_int4': True}  # whether values are rounded to four bits
BASES = (DENSE, *BY_PATTERN, *(name for name in FORMATS if not FORMATS.find(name).brings_mask))


def prune_rules(config: ConfigDict) -> list[tuple[str, Pattern]]:
    """Return (regex, pattern) for each tower's blocks; everything else stays dense.

    Args:
      config: a recipe.

    Raises:
      PatternError: a pattern does not parse.
    """
    patterns = []
    for tower in towers(config):
        try:
            pattern = parse_pattern(config.prune.pattern[tower])
        except PatternError as error:
            raise PatternError(f'prune.pattern.{tower}: {error}') from None
        patterns.append((block_rule(tower), pattern))
    return [*patterns, ('.*', Pattern())]


def rounded_rules(config: ConfigDict) -> list[tuple[str, Pattern]]:
    """Return (regex, pattern) for the kernels that `restore.base` rounds; everything else is dense.

    Args:
      config: the recipe.

    Returns:
      Ordered rules; empty if nothing is rounded.
    """
    rounded = [
        (regex, pattern if form is not None and find_format(form).levels is not None else Pattern())
        for regex, pattern, form in _base_rules(config)
    ]
    return rounded if any(not pattern.dense for _, pattern in rounded) else []


def rounded_format(config: ConfigDict) -> str:
    """Return the name of the format to whose values the kernels of `rounded_rules` are rounded.

    Args:
      config: a recipe whose `restore.base` rounds some kernels.
    """
    names = (form for _, _, form in _base_rules(config) if form is not None)
    return next(name for name in names if find_format(name).levels is not None)


def pack_formats(config: ConfigDict, *, four_bits: bool) -> list[tuple[str, str]]:
    """Return (regex, format of `packing.pack`) for each pruned tower: the first format that supports its pattern.

    Args:
      config: the recipe.
      four_bits: use formats that round values to four bits, if there is one for the pattern.
    """
    patterns = {tower: parse_pattern(config.prune.pattern[tower]) for tower in towers(config)}
    return [
        (f'{tower}/.*', format_for(pattern, four_bits=four_bits))
        for tower, pattern in patterns.items()
        if not pattern.dense
    ]


def base_formats(config: ConfigDict) -> str | list[tuple[str, str]] | None:
    """Return the formats of pruned kernels in restoration, see `packing.reduce_kernels`.

    Args:
      config: the recipe.

    Returns:
      The name of one format, or rules (regex, name); None: kernels stay dense arrays.
    """
    base = config.restore.base
    if base == DENSE:
        return None
    return pack_formats(config, four_bits=BY_PATTERN[base]) if base in BY_PATTERN else base


def stores_masks(config: ConfigDict) -> bool:
    """Return whether the pruned kernels of the base store their masks.

    Args:
      config: a recipe.
    """
    base = config.restore.base
    return base in BY_PATTERN or (base != DENSE and find_format(base).brings_mask)


def _base_rules(config: ConfigDict) -> list[tuple[str, Pattern, str | None]]:
    """Return (regex, pattern, format) for each tower, by `restore.base`; format None is a dense array."""
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


def split_alternatives(regex: str) -> list[str]:
    """Split a regex at each `|` that stands outside brackets.

    Args:
      regex: a valid regular expression.

    >>> split_alternatives('attn/(q|k)/kernel|mlp/up/kernel')
    ['attn/(q|k)/kernel', 'mlp/up/kernel']
    """
    alternatives = ['']
    depth = 0  # of open groups
    # Tokens: an escaped character, a set of characters (in which a first `]` is literal), or any other character.
    for token in re.findall(r'\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.', regex, re.DOTALL):
        if token == '(':
            depth += 1
        elif token == ')':
            depth -= 1
        if token == '|' and depth == 0:
            alternatives.append('')
        else:
            alternatives[-1] += token
    return alternatives


def lora_rules(config: ConfigDict) -> list[tuple[str, LoraSpec | None]]:
    """Return (regex, LoraSpec) for each tower's blocks; everything else gets no LoRA.

    Args:
      config: a recipe.
    """
    lora = config.lora
    specs = []
    for tower in towers(config):
        rank = lora.rank[tower]
        # Rank 0 means no LoRA in a tower. The tower keeps its rule, so that no other tower's rule matches its kernels.
        spec = LoraSpec(rank, lora.alpha[tower]) if rank else None
        specs.append((block_rule(tower, lora.targets[tower]), spec))
    return [*specs, ('.*', None)]


def check_ranks(config: ConfigDict, params: dict) -> None:
    """Check that no rank is larger than every kernel of its tower that gets LoRA.

    Args:
      config: a recipe.
      params: params, or anything with their shapes.

    Raises:
      ConfigError: a rank is; names the highest rank that a kernel of the tower can have.
    """
    all_kernels = kernels(params)
    for tower in towers(config):
        rule = block_rule(tower, config.lora.targets[tower])
        adapted = [kernel for path, kernel in all_kernels.items() if re.fullmatch(rule, path)]
        # The product of two factors has at most the rank of the kernel's shorter axis.
        highest = max((min(kernel.shape[-2:]) for kernel in adapted), default=0)
        if adapted and config.lora.rank[tower] > highest:
            raise ConfigError(
                f'lora.rank.{tower} {config.lora.rank[tower]}: expected at most {highest}, the shorter side of the '
                "tower's largest kernel"
            )


def check_targets(config: ConfigDict, params: dict) -> None:
    """Check that every alternative of `lora.targets` matches a kernel; a misspelt one would be ignored silently.

    Args:
      config: a recipe.
      params: params, or anything with their shapes.

    Raises:
      ConfigError: an alternative matches no kernel; the message lists the existing kernels.
    """
    paths = kernels(params)
    for tower in towers(config):
        for alternative in split_alternatives(config.lora.targets[tower]):
            if any(re.fullmatch(block_rule(tower, alternative), path) for path in paths):
                continue
            # Listed without the tower and the blocks, as users write them in the field.
            in_blocks = (path for path in paths if re.fullmatch(block_rule(tower), path))
            rests = sorted({name_in_block(path) for path in in_blocks})
            raise ConfigError(
                f'lora.targets.{tower}: {alternative!r} matches no kernel of the blocks; they are {", ".join(rests)}'
            )
