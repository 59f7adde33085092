"""Turn a config into arguments of the library; the configs themselves are in `configs/`."""

from sparselora_jax.recipe.checks import check_batches, check_family, check_values
from sparselora_jax.recipe.config import ConfigError, field_names, override, towers
from sparselora_jax.recipe.fields import (
    DTYPES,
    FIELDS,
    LARGEST_COUNT,
    TEACHERS,
    check_names,
    check_value,
    default_config,
    fields_page,
    fields_text,
    nearest,
)
from sparselora_jax.recipe.kernel_rules import (
    BASES,
    BY_PATTERN,
    DENSE,
    base_formats,
    check_ranks,
    check_targets,
    lora_rules,
    pack_formats,
    prune_rules,
    rounded_format,
    rounded_rules,
    split_alternatives,
)
from sparselora_jax.recipe.methods import allocation_of, check_allocation, prune_methods
from sparselora_jax.recipe.questions import NO_DECODING, data_loader, decoding, metric, text_format
from sparselora_jax.recipe.restoring import reads_teacher, restore_program, runs_teacher
from sparselora_jax.recipe.saved import from_fields
from sparselora_jax.recipe.workdir import CONFIG_FILE, CONFIG_REMEDY, NO_RESULT, claim, refuse_other

__all__ = [
    'BASES',
    'BY_PATTERN',
    'CONFIG_FILE',
    'CONFIG_REMEDY',
    'DENSE',
    'DTYPES',
    'FIELDS',
    'LARGEST_COUNT',
    'NO_DECODING',
    'NO_RESULT',
    'TEACHERS',
    'ConfigError',
    'allocation_of',
    'base_formats',
    'check_allocation',
    'check_batches',
    'check_family',
    'check_names',
    'check_ranks',
    'check_targets',
    'check_value',
    'check_values',
    'claim',
    'data_loader',
    'decoding',
    'default_config',
    'field_names',
    'fields_page',
    'fields_text',
    'from_fields',
    'lora_rules',
    'metric',
    'nearest',
    'override',
    'pack_formats',
    'prune_methods',
    'prune_rules',
    'reads_teacher',
    'refuse_other',
    'restore_program',
    'rounded_format',
    'rounded_rules',
    'runs_teacher',
    'split_alternatives',
    'text_format',
    'towers',
]
