"""Reads a LLaMA language model and its tokenizer from a GGUF file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparselora_jax.models import llama
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.sparse import rules

_BLOCK_KERNELS = {
    'attn/q': 'attn_q',
    'attn/k': 'attn_k',
    'attn/v': 'attn_v',
    'attn/o': 'attn_output',
    'mlp/gate': 'ffn_gate',
    'mlp/up': 'ffn_up',
    'mlp/down': 'ffn_down',
}
_NORMS = {'norm1': 'attn_norm', 'norm2': 'ffn_norm'}


class AssetError(SparseloraError, ValueError):
    """A file that is missing, truncated or not what it should be."""


def _unpermute(kernel: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two rotary halves of q and k; puts the rows [out, in] back in Hugging Face's order."""
    rows, columns = kernel.shape
    return kernel.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _open(path: str | Path) -> tuple[Any, Callable[[str], Any]]:
    """The file's reader, and a function from a header's key (and what holds without it) to its value."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Without a memory map for each word of the header: a fifth of the seconds that a vocabulary takes."""

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

    def value(key: str, default: Any = None):
        if key in reader.fields:
            return reader.fields[key].contents()
        if default is None:
            raise AssetError(f'{path}: the header has no {key!r}')
        return default

    return reader, value


def load_tokenizer(path: str | Path, image_token: int | None = None) -> Any:
    """The byte-level BPE tokenizer of a GGUF file, as one of transformers' (which itself reads GGUF only with torch).

    Args:
      image_token: which of its special tokens is called '<image>' here, as BLIP-2's processor has it.

    Raises:
      AssetError: the file is missing, truncated, or its tokenizer is of another kind.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    _, value = _open(path)
    if value('tokenizer.ggml.model') != 'gpt2':
        raise AssetError(f'{path}: tokenizer {value("tokenizer.ggml.model")!r}, expected byte-level BPE (gpt2)')
    tokens = list(value('tokenizer.ggml.tokens'))
    if image_token is not None:
        tokens[image_token] = '<image>'
    merges = [tuple(merge.split(' ')) for merge in value('tokenizer.ggml.merges')]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    split = [pre_tokenizers.Digits(individual_digits=True)] if value('tokenizer.ggml.pre') == 'smollm' else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, value('tokenizer.ggml.token_type'), strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    names = {'bos_token': 'bos', 'eos_token': 'eos', 'unk_token': 'unknown', 'pad_token': 'padding'}
    special = {ours: tokens[value(f'tokenizer.ggml.{theirs}_token_id')] for ours, theirs in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side='left', **special)


def _check_positions(path: str | Path, cfg: llama.LlamaConfig, value: Callable[..., Any]) -> None:
    """Raises `AssetError` unless every element of a head is rotated, by plain rotary positions."""
    for key, plain in {'rope.scaling.type': 'none', 'rope.scale_linear': 1.0}.items():
        if (have := value(f'llama.{key}', plain)) != plain:
            raise AssetError(f'{path}: llama.{key} {have!r}: only plain rotary positions are known; use another file')
    for key in ('attention.value_length', 'rope.dimension_count'):
        if (have := value(f'llama.{key}', cfg.head_dim)) != cfg.head_dim:
            raise AssetError(f'{path}: llama.{key} {have}: expected that of a head, {cfg.head_dim}; use another file')


def load_llama(path: str | Path, *, dtype=jnp.float32) -> tuple[llama.LlamaConfig, dict]:
    """Dequantises a GGUF file of the LLaMA architecture.

    Returns:
      The model's config and its params tree; kernels are `[layers, in, out]`.

    Raises:
      AssetError: the file is missing, truncated, not GGUF, not of the LLaMA architecture, lacks a tensor, or holds
        tensors or rotary positions that a LLaMA here has no place for.
    """
    # Imported here: a researcher who only imports the functions needs no reader.
    from gguf import dequantize

    reader, value = _open(path)
    if value('general.architecture') != 'llama':
        raise AssetError(f'{path}: architecture {value("general.architecture")!r}, expected llama')
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> np.ndarray:
        if name not in tensors:
            raise AssetError(f'{path}: tensor {name!r} is missing')
        # A copy: what is stored in fp32 is a view of the file, and would keep all of it mapped.
        return np.array(dequantize(tensors[name].data, tensors[name].tensor_type))

    width, heads = value('llama.embedding_length'), value('llama.attention.head_count')
    cfg = llama.LlamaConfig(
        vocab=read('token_embd.weight').shape[0],
        width=width,
        depth=value('llama.block_count'),
        heads=heads,
        kv_heads=value('llama.attention.head_count_kv'),
        mlp_width=value('llama.feed_forward_length'),
        rope_base=value('llama.rope.freq_base'),
        norm_eps=value('llama.attention.layer_norm_rms_epsilon'),
        max_positions=value('llama.context_length'),
        head_dim=value('llama.attention.key_length', width // heads),
        tied='output.weight' not in tensors,
    )
    _check_positions(path, cfg, value)

    def kernel(layer: int, name: str) -> np.ndarray:
        array = read(f'blk.{layer}.{name}.weight')
        if name in ('attn_q', 'attn_k'):
            array = _unpermute(array, cfg.heads if name == 'attn_q' else cfg.kv_heads)
        return array.T

    parts = [*_BLOCK_KERNELS.values(), *_NORMS.values()]
    known = {f'blk.{i}.{part}.weight' for i in range(cfg.depth) for part in parts}
    if unknown := sorted(tensors.keys() - known - {'token_embd.weight', 'output_norm.weight', 'output.weight'}):
        raise AssetError(f'{path}: no place for its tensors {", ".join(unknown[:5])} in a LLaMA here; use another file')
    flat = {'embed': read('token_embd.weight'), 'norm/scale': read('output_norm.weight')}
    for ours, theirs in _BLOCK_KERNELS.items():
        flat[f'blocks/{ours}/kernel'] = np.stack([kernel(layer, theirs) for layer in range(cfg.depth)])
    for ours, theirs in _NORMS.items():
        flat[f'blocks/{ours}/scale'] = np.stack([read(f'blk.{i}.{theirs}.weight') for i in range(cfg.depth)])
    if not cfg.tied:
        flat['head/kernel'] = read('output.weight').T
    return cfg, rules.unflatten({name: jnp.asarray(array, dtype) for name, array in flat.items()})
