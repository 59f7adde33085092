"""Read config.json of a Hugging Face directory, and refuse values that no model can have.

`VALUES` is the table of these values. It lists fields of transformers' configs by name, whatever the kind of model.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparselora_jax.runtime.files import StorageError, read_json

if TYPE_CHECKING:
    import transformers

CONFIG = 'config.json'
REMEDY = 'download it again'
# Fields that name tokens of the language model.
SPECIAL_TOKENS = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'decoder_start_token_id')
# No model has more layers. A list of the weights of so many would still fit into memory.
_MOST_LAYERS = 10_000
_LARGEST_SIZE = 2**31 - 1  # arrays have no longer axes


def read_fields(folder: Path) -> dict[str, Any]:
    """Return the fields of config.json as the file has them.

    Args:
      folder: a Hugging Face directory.

    Raises:
      StorageError: the file is damaged, names no kind of model, or a value is impossible.
    """
    path = folder / CONFIG
    fields = read_json(path, REMEDY)
    kind = fields.get('model_type')
    if not isinstance(kind, str):
        raise StorageError(f'{path}: model_type {kind!r}: expected the name of a kind of model; {REMEDY}')
    # Before transformers reads them, since it computes with the values, and may rename fields.
    check_values(path, fields)
    return fields


def parse(folder: Path) -> 'transformers.PretrainedConfig':
    """Return the transformers config of a directory, without running code from the directory.

    Args:
      folder: a Hugging Face directory.

    Raises:
      StorageError: see `read_fields`; or transformers does not read the file, or a default does not fit a value.
    """
    import transformers

    read_fields(folder)
    path = folder / CONFIG
    try:
        # Remote code is not trusted, so an `auto_map` in the file runs nothing.
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # transformers computes with the values before it has checked all of them, so it may raise errors of any class.
    except Exception as error:
        raise StorageError(f'{path}: transformers does not read it ({error})') from None
    # Again, with the defaults of the fields that the file lacks.
    check_values(path, config.to_dict())
    return config


class Rule(NamedTuple):
    """Which values a field may have.

    Attributes:
      names: regex of the names of the fields, wherever they are nested.
      accepts: whether a value is possible.
      expected: the possible values in words.
    """

    names: str
    accepts: Callable[[Any], bool]
    expected: str


def is_count(value: object, least: int = 1, most: int = _LARGEST_SIZE) -> bool:
    """Return whether a value is a whole number within bounds; in Python, True is one too, but not here.

    Args:
      value: the value.
      least: the smallest number.
      most: the largest number.
    """
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_positive(value: object) -> bool:
    """Return whether a value is a finite number above 0.

    Args:
      value: the value.
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


# The first rule whose regex matches the whole name applies. Fields without a rule are not read, or are checked where
# they are.
VALUES = (
    Rule(
        'num_hidden_layers|num_layers|num_decoder_layers',
        lambda value: is_count(value, most=_MOST_LAYERS),
        f'a whole number from 1 to {_MOST_LAYERS}',
    ),
    Rule(
        'hidden_size|d_model|intermediate_size|d_ff|ffn_dim|vocab_size|image_size|patch_size|num_channels|'
        'num_attention_heads|num_heads|num_key_value_heads|head_dim|d_kv|num_query_tokens|max_position_embeddings|'
        'original_max_position_embeddings|word_embed_proj_dim|encoder_hidden_size|projection_dim|sliding_window|'
        'cross_attention_frequency|relative_attention_num_buckets|relative_attention_max_distance|'
        'image_text_hidden_size',
        is_count,
        f'a whole number from 1 to {_LARGEST_SIZE}',
    ),
    Rule('rope_theta|factor|low_freq_factor|high_freq_factor', is_positive, 'a number above 0'),
    Rule(
        'rms_norm_eps|layer_norm_eps|layer_norm_epsilon',
        lambda value: is_positive(value) and value < 1,
        'a number between 0 and 1',
    ),
    Rule('.*drop(out|path|_path)?(_rate|_prob)?|.*layerdrop|resid_pdrop', _is_share, 'a number from 0 to 1'),
    # May lie behind the vocabulary: soft words replace its embedding.
    Rule('image_token_(id|index)', lambda value: is_count(value, 0), 'a token, 0 or more'),
    Rule(
        'tie_word_embeddings|attention_bias|mlp_bias|qkv_bias|enable_bias|do_layer_norm_before|'
        'layer_norm_elementwise_affine|multimodal_projector_bias',
        lambda value: isinstance(value, bool),
        'true or false',
    ),
)


def check_values(path: Path, fields: Mapping[Any, Any]) -> None:
    """Check every field of a config, also of the configs of towers in it.

    Args:
      path: the file, for the message.
      fields: its fields.

    Raises:
      StorageError: a value is impossible, or contradicts another one; names the field, its value and what is expected.
    """
    problem = next(_problems(fields, ''), None)
    if problem is not None:
        raise StorageError(f'{path}: {problem}; {REMEDY}')


def _problems(fields: Mapping[Any, Any], prefix: str) -> Iterator[str]:
    """Yield what is wrong with the fields of a config.

    Args:
      fields: the config; those of towers are nested.
      prefix: put before the names of fields.
    """
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _problems(value, f'{prefix}{name}.')
        # None stands for a default that other fields decide.
        if value is None:
            continue
        rule = next((rule for rule in VALUES if re.fullmatch(rule.names, str(name))), None)
        if rule is not None and not rule.accepts(value):
            yield f'{prefix}{name} {value!r}: expected {rule.expected}'
    yield from _contradictions(fields, prefix)
    yield from _unknown_tokens(fields, prefix)


def _contradictions(fields: Mapping[Any, Any], prefix: str) -> Iterator[str]:
    """Yield which numbers of a config contradict each other."""
    width = fields.get('hidden_size')
    heads = fields.get('num_attention_heads')
    head_dim = fields.get('head_dim')
    # With a size of its own, a head need not be a part of the width.
    if width and heads and not head_dim and width % heads:
        yield f'{prefix}num_attention_heads {heads}: does not divide hidden_size, {width}'
    groups = fields.get('num_key_value_heads')
    if heads and groups and heads % groups:
        yield f'{prefix}num_key_value_heads {groups}: does not divide num_attention_heads, {heads}'
    if fields.get('rope_parameters') and width and heads:
        # Rotary positions turn pairs of numbers.
        numbers = head_dim or width // heads
        if numbers % 2:
            yield f'{prefix}num_attention_heads {heads}: a head has {numbers} numbers, expected an even count'
    patch = fields.get('patch_size')
    image = fields.get('image_size')
    if patch and image and patch > image:
        yield f'{prefix}patch_size {patch}: is larger than image_size, {image}'
    low = fields.get('low_freq_factor')
    high = fields.get('high_freq_factor')
    if low and high and low >= high:
        yield f'{prefix}low_freq_factor {low}: expected less than high_freq_factor, {high}'


def _unknown_tokens(fields: Mapping[Any, Any], prefix: str) -> Iterator[str]:
    """Yield which special tokens are not in the vocabulary."""
    # The vocabulary of a model of several towers is that of its language model.
    text = fields.get('text_config')
    vocab = (text if isinstance(text, Mapping) else fields).get('vocab_size')
    most = vocab - 1 if is_count(vocab) else _LARGEST_SIZE
    for name in SPECIAL_TOKENS:
        value = fields.get(name)
        if value is None:
            continue
        # Some LLaMAs have -1 as pad, which stands for none.
        least = -1 if name == 'pad_token_id' else 0
        tokens = value if isinstance(value, list) else [value]
        if not all(is_count(token, least, most) for token in tokens):
            yield f'{prefix}{name} {value!r}: expected a token from 0 to {most}, below vocab_size'
