"""A model for others to read: a Hugging Face directory of the language tower, and the whole model as safetensors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from sparselora_jax import rules, storage
from sparselora_jax.data.pipeline import TextFormat
from sparselora_jax.models import blip2, llama

# Ours -> Hugging Face's LLaMA, of one layer; kernels are transposed to [out, in] there.
_LAYER_NAMES = {
    **{f'attn/{name}/kernel': f'self_attn.{name}_proj.weight' for name in 'qkvo'},
    **{f'mlp/{name}/kernel': f'mlp.{name}_proj.weight' for name in ('gate', 'up', 'down')},
    'norm1/scale': 'input_layernorm.weight',
    'norm2/scale': 'post_attention_layernorm.weight',
}


def llama_state_dict(params: dict) -> dict[str, np.ndarray]:
    """Params of `models.llama` under Hugging Face's names: layers unstacked, kernels [out, in]."""
    flat = {path: np.asarray(leaf) for path, leaf in rules.flatten(params).items()}
    state = {'model.embed_tokens.weight': flat['embed'], 'model.norm.weight': flat['norm/scale']}
    if 'head/kernel' in flat:
        state['lm_head.weight'] = np.ascontiguousarray(flat['head/kernel'].T)
    for ours, theirs in _LAYER_NAMES.items():
        for layer, leaf in enumerate(flat[f'blocks/{ours}']):
            state[f'model.layers.{layer}.{theirs}'] = np.ascontiguousarray(leaf.T)
    return state


def save_llama(folder: str | Path, cfg: llama.LlamaConfig, params: dict, tokenizer: Any = None) -> None:
    """Writes a directory that `transformers.AutoModelForCausalLM.from_pretrained` loads: same logits, same zeros."""
    from transformers import GenerationConfig, LlamaConfig

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    eos = {} if tokenizer is None else {'eos_token_id': tokenizer.eos_token_id, 'pad_token_id': tokenizer.pad_token_id}
    config = LlamaConfig(
        architectures=['LlamaForCausalLM'],
        vocab_size=cfg.vocab,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        head_dim=cfg.head_dim,
        intermediate_size=cfg.mlp_width,
        rope_parameters={'rope_type': 'default', 'rope_theta': cfg.rope_base},
        rms_norm_eps=cfg.norm_eps,
        max_position_embeddings=cfg.max_positions,
        tie_word_embeddings='head' not in params,
        dtype=jnp.dtype(params['embed'].dtype).name,
        **eos,
    )
    config.save_pretrained(folder)
    GenerationConfig(**eos).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    save_file(llama_state_dict(params), folder / 'model.safetensors', metadata={'format': 'pt'})


def check_llama(folder: str | Path, params: dict) -> None:
    """Reads the weights of `save_llama` back.

    Raises:
      StorageError: they are not `params`, bit for bit.
    """
    file, want = Path(folder) / 'model.safetensors', llama_state_dict(params)
    read = load_file(file)
    for name in sorted(want.keys() | read.keys()):
        if name not in want or name not in read or not np.array_equal(want[name], read[name]):
            raise storage.StorageError(f'{file}: {name}, read back, is not what was written')


def save_model(path: str | Path, cfg: blip2.Blip2Config, params: dict, text: TextFormat | None = None) -> None:
    """The whole model as one safetensors file; its config, and how its questions are written, lie in the header."""
    header = json.loads(blip2.to_json(cfg)) | ({} if text is None else {'text': dataclasses.asdict(text)})
    storage.save_safetensors(path, params, metadata={'config': json.dumps(header)})


def load_text_format(path: str | Path) -> TextFormat:
    """How the questions of a saved model are written; the default where its file does not say.

    Raises:
      StorageError: the file is missing, truncated or without a config.
    """
    metadata = storage.read_metadata(path)
    blip2.from_header(path, metadata)  # names a header that holds no config
    return TextFormat(**json.loads(metadata['config']).get('text', {}))


def load_model(path: str | Path) -> tuple[blip2.Blip2Config, dict]:
    """What `save_model` wrote.

    Raises:
      StorageError: the file is missing, truncated, without a config, or lacks a parameter of that config.
    """
    params, metadata = storage.load_safetensors(path)
    cfg = blip2.from_header(path, metadata)
    tied = 'language/head/kernel' not in rules.flatten(params)
    storage.check_shapes(path, params, blip2.bridge_shapes(cfg) | {'language': llama.shapes(cfg.language, tied)})
    return cfg, params
