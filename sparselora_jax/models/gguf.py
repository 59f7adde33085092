"""Reads a LLaMA language model from a GGUF file into a params tree."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sparselora_jax import rules
from sparselora_jax.errors import SparseloraError
from sparselora_jax.models import llama

_BLOCK_KERNELS = {
    'attn/q': 'attn_q',
    'attn/k': 'attn_k',
    'attn/v': 'attn_v',
    'attn/o': 'attn_output',
    'mlp/gate': 'ffn_gate',
    'mlp/up': 'ffn_up',
    'mlp/down': 'ffn_down',
}


class AssetError(SparseloraError, ValueError):
    """A file that is missing, truncated or not what it should be."""


def _unpermute(kernel: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two rotary halves of q and k; puts the rows [out, in] back in Hugging Face's order."""
    rows, columns = kernel.shape
    return kernel.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def load_llama(path: str | Path, *, dtype=jnp.float32) -> tuple[llama.LlamaConfig, dict]:
    """Dequantises a GGUF file of the LLaMA architecture.

    Returns:
      The model's config and its params tree; kernels are `[layers, in, out]`.

    Raises:
      AssetError: the file is missing, truncated, not GGUF, not of the LLaMA architecture, or lacks a tensor.
    """
    # Imported here: the reader is needed by the asset only, not by a researcher who imports the functions.
    from gguf import GGUFReader, dequantize

    path = Path(path)
    if not path.is_file():
        raise AssetError(f'{path}: no such file')
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise AssetError(f'{path}: not a complete GGUF file ({error}); install or download it again') from None

    def value(key: str):
        if key not in reader.fields:
            raise AssetError(f'{path}: the header has no {key!r}; expected a model of the LLaMA architecture')
        return reader.fields[key].contents()

    if value('general.architecture') != 'llama':
        raise AssetError(f'{path}: architecture {value("general.architecture")!r}, expected llama')
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> np.ndarray:
        if name not in tensors:
            raise AssetError(f'{path}: tensor {name!r} is missing')
        return dequantize(tensors[name].data, tensors[name].tensor_type)

    cfg = llama.LlamaConfig(
        vocab=read('token_embd.weight').shape[0],
        width=value('llama.embedding_length'),
        depth=value('llama.block_count'),
        heads=value('llama.attention.head_count'),
        kv_heads=value('llama.attention.head_count_kv'),
        mlp_width=value('llama.feed_forward_length'),
        rope_base=value('llama.rope.freq_base'),
        norm_eps=value('llama.attention.layer_norm_rms_epsilon'),
        max_positions=value('llama.context_length'),
    )

    def kernel(layer: int, name: str) -> np.ndarray:
        array = read(f'blk.{layer}.{name}.weight')
        if name in ('attn_q', 'attn_k'):
            array = _unpermute(array, cfg.heads if name == 'attn_q' else cfg.kv_heads)
        return array.T

    flat = {'embed': read('token_embd.weight'), 'norm/scale': read('output_norm.weight')}
    for ours, theirs in _BLOCK_KERNELS.items():
        flat[f'blocks/{ours}/kernel'] = np.stack([kernel(layer, theirs) for layer in range(cfg.depth)])
    for ours, theirs in {'norm1': 'attn_norm', 'norm2': 'ffn_norm'}.items():
        flat[f'blocks/{ours}/scale'] = np.stack([read(f'blk.{i}.{theirs}.weight') for i in range(cfg.depth)])
    if 'output.weight' in tensors:
        flat['head/kernel'] = read('output.weight').T
    return cfg, rules.unflatten({name: jnp.asarray(array, dtype) for name, array in flat.items()})
