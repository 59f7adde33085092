"""Read a LLaMA language model and its tokenizer from a GGUF file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

from sparselora_jax.models import llama
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.sparse import rules

# Our names within a block -> GGUF's.
_KERNELS = {
    'attn/q': 'attn_q',
    'attn/k': 'attn_k',
    'attn/v': 'attn_v',
    'attn/o': 'attn_output',
    'mlp/gate': 'ffn_gate',
    'mlp/up': 'ffn_up',
    'mlp/down': 'ffn_down',
}
_NORMS = {'norm1': 'attn_norm', 'norm2': 'ffn_norm'}
_CONTROL = 3  # the type of a token that is not text, LLAMA_TOKEN_TYPE_CONTROL

# Takes a key of the header and a default, and returns the key's value.
Header = Callable[..., Any]


class AssetError(SparseloraError, ValueError):
    """A file that is missing, truncated or of another kind than expected."""


def _unpermute(kernel: Shaped[np.ndarray, 'out in'], heads: int) -> Shaped[np.ndarray, 'out in']:
    """Put the rows of q or k back in Hugging Face's order: GGUF interleaves the two rotary halves of each head."""
    rows, columns = kernel.shape
    # Within a head GGUF has pairs (0, half), (1, half + 1), ...; Hugging Face has the first half, then the second.
    return kernel.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _open(path: str | Path) -> tuple[Any, Header]:
    """Open a GGUF file.

    Returns:
      (gguf's reader, a function that returns the value of a key of the header, or a default).

    Raises:
      AssetError: the file is missing, truncated or not GGUF.
    """
    # Imported here, so that importing this module does not require the package gguf.
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Read the header without a memory map for each word, which reads a vocabulary in a fifth of the time."""

        # Overrides a method of gguf with the same signature and result.
        def _get(self, offset, dtype, count=1, override_order=None):
            dtype = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
            return np.frombuffer(self.data, dtype, int(count), int(offset))

    path = Path(path)
    if not path.is_file():
        raise AssetError(f'{path}: no such file')
    try:
        reader = Reader(path)
    except (ValueError, IndexError) as error:
        raise AssetError(f'{path}: not a complete GGUF file ({error}); install or download it again') from None

    def value_of(key: str, default: str | int | float | None = None) -> Any:
        if key in reader.fields:
            return reader.fields[key].contents()
        if default is None:
            raise AssetError(f'{path}: the header has no {key!r}')
        return default

    return reader, value_of


def load_tokenizer(path: str | Path, image_token: int | None = None) -> Any:
    """Load the byte-level BPE tokenizer of a GGUF file as a tokenizer of transformers.

    transformers itself reads GGUF only with torch.

    Args:
      path: the file.
      image_token: id of the special token that is renamed '<image>', as BLIP-2's processor expects; None: none.

    Raises:
      AssetError: the file is missing or truncated, or its tokenizer is of another kind.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    _, value_of = _open(path)
    kind = value_of('tokenizer.ggml.model')
    if kind != 'gpt2':
        raise AssetError(f'{path}: tokenizer {kind!r}, expected byte-level BPE (gpt2)')
    tokens = list(value_of('tokenizer.ggml.tokens'))
    if image_token is not None:  # a reserved token that occurs in no text
        tokens[image_token] = '<image>'
    merges = [tuple(merge.split(' ')) for merge in value_of('tokenizer.ggml.merges')]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    # SmolLM's tokenizer splits numbers into digits before it merges bytes; GGUF only gives the name of the model.
    digits = [pre_tokenizers.Digits(individual_digits=True)] if value_of('tokenizer.ggml.pre') == 'smollm' else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    token_types = value_of('tokenizer.ggml.token_type')
    control = [token for token, token_type in zip(tokens, token_types, strict=True) if token_type == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    # transformers' names -> GGUF's.
    names = {'bos_token': 'bos', 'eos_token': 'eos', 'unk_token': 'unknown', 'pad_token': 'padding'}
    special = {ours: tokens[value_of(f'tokenizer.ggml.{theirs}_token_id')] for ours, theirs in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side='left', **special)


def _check_positions(path: str | Path, cfg: llama.LlamaConfig, value_of: Header) -> None:
    """Raise `AssetError` unless plain rotary positions rotate every element of a head."""
    for key, plain in {'rope.scaling.type': 'none', 'rope.scale_linear': 1.0}.items():
        value = value_of(f'llama.{key}', plain)
        if value != plain:
            raise AssetError(f'{path}: llama.{key} {value!r}: only plain rotary positions are known; use another file')
    for key in ('attention.value_length', 'rope.dimension_count'):
        value = value_of(f'llama.{key}', cfg.head_dim)
        if value != cfg.head_dim:
            raise AssetError(f'{path}: llama.{key} {value}: expected that of a head, {cfg.head_dim}; use another file')


def load_llama(path: str | Path, *, dtype: DTypeLike = jnp.float32) -> tuple[llama.LlamaConfig, dict]:
    """Dequantise a GGUF file of the LLaMA architecture.

    Args:
      path: the file.
      dtype: dtype of the params.

    Returns:
      The model's config and its params tree; kernels are `[layers, in, out]`.

    Raises:
      AssetError: the file is missing, truncated, not GGUF, or not of the LLaMA architecture; it lacks a tensor; or it
        has tensors or rotary positions that our LLaMA does not support.
    """
    from gguf import dequantize

    reader, value_of = _open(path)
    architecture = value_of('general.architecture')
    if architecture != 'llama':
        raise AssetError(f'{path}: architecture {architecture!r}, expected llama')
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> Shaped[np.ndarray, '...']:
        if name not in tensors:
            raise AssetError(f'{path}: tensor {name!r} is missing')
        # Copied, since an fp32 tensor is a view of the file and would keep the whole file mapped.
        return np.array(dequantize(tensors[name].data, tensors[name].tensor_type))

    width = value_of('llama.embedding_length')
    heads = value_of('llama.attention.head_count')
    cfg = llama.LlamaConfig(
        vocab=read('token_embd.weight').shape[0],
        width=width,
        depth=value_of('llama.block_count'),
        heads=heads,
        kv_heads=value_of('llama.attention.head_count_kv'),
        mlp_width=value_of('llama.feed_forward_length'),
        rope_base=value_of('llama.rope.freq_base'),
        norm_eps=value_of('llama.attention.layer_norm_rms_epsilon'),
        max_positions=value_of('llama.context_length'),
        head_dim=value_of('llama.attention.key_length', width // heads),
        tied='output.weight' not in tensors,
    )
    # Without these checks, anything beyond a plain LLaMA would be ignored silently.
    _check_positions(path, cfg, value_of)
    _check_names(path, cfg, tensors)

    def read_kernel(layer: int, name: str) -> Shaped[np.ndarray, 'in out']:
        array = read(f'blk.{layer}.{name}.weight')
        if name in ('attn_q', 'attn_k'):
            array = _unpermute(array, cfg.heads if name == 'attn_q' else cfg.kv_heads)
        return array.T  # GGUF has [out, in], as torch has

    # Stack on the host, where one layer's arrays and their stack exist at a time; the device gets whole stacks.
    flat = {'embed': read('token_embd.weight'), 'norm/scale': read('output_norm.weight')}
    for ours, theirs in _KERNELS.items():
        kernels = [read_kernel(layer, theirs) for layer in range(cfg.depth)]
        flat[rules.block_path('', f'{ours}/kernel')] = np.stack(kernels)
    for ours, theirs in _NORMS.items():
        scales = [read(f'blk.{layer}.{theirs}.weight') for layer in range(cfg.depth)]
        flat[rules.block_path('', f'{ours}/scale')] = np.stack(scales)
    if not cfg.tied:
        flat['head/kernel'] = read('output.weight').T
    return cfg, rules.unflatten({name: jnp.asarray(array, dtype) for name, array in flat.items()})


def _check_names(path: str | Path, cfg: llama.LlamaConfig, tensors: dict[str, Any]) -> None:
    """Raise `AssetError` if a file holds tensors that our LLaMA does not support: biases, or scales of positions."""
    parts = [*_KERNELS.values(), *_NORMS.values()]
    in_blocks = {f'blk.{layer}.{part}.weight' for layer in range(cfg.depth) for part in parts}
    unknown = sorted(tensors.keys() - in_blocks - {'token_embd.weight', 'output_norm.weight', 'output.weight'})
    if unknown:
        raise AssetError(f'{path}: no place for its tensors {", ".join(unknown[:5])} in a LLaMA here; use another file')
