"""The configs of published checkpoints, so that recipes can be checked against real shapes without a network.

What transformers' config classes take as their defaults (BLIP-2's vision tower and Q-Former) is left out. The sizes of
ViT-g, the Q-Formers, OPT, FlanT5, Vicuna, CLIP and Gemma are the papers'.

What may differ between revisions of the same checkpoint, and what stands here:

- Vocabulary. BLIP-2 OPT: 50272 as first published, 50304 (here) since the image token 50265 got a place of its own.
  InstructBLIP Vicuna: 32000 of LLaMA, 32001 (here) with a pad token. LLaVA-1.5: 32000, 32064 (here) with image and pad
  tokens, filled up. PaliGemma: 257152 in transformers' defaults, 257216 (here) with the image token's row and padding.
- Heads. Transformers 5 says of every T5 that its head is tied to the word embedding; FlanT5's files hold a head of its
  own. What a T5's file says of it decides in transformers 5 whether the head is scaled; `model_config` reads it there.
- LLaVA's files also hold CLIP's last layer and final norm, which nothing reads.

From memory, not checked against the hub: image tokens, epsilons and lengths of positions, none of which changes a
shape; the padded vocabularies of OPT and LLaVA, which do. Transformers' conversion scripts say: the Q-Former's 30523,
Vicuna's 32001, PaliGemma's sizes, and that BLIP-2's FlanT5 takes the exact GELU.
"""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparselora_jax.checkpoints.load import read_config
from sparselora_jax.models.model import from_hf
from sparselora_jax.runtime.errors import UnsupportedModelError
from sparselora_jax.runtime.files import StorageError

_OPT = {'model_type': 'opt', 'vocab_size': 50304, 'num_attention_heads': 32, 'num_hidden_layers': 32}
_OPT_2_7B = _OPT | {'hidden_size': 2560, 'ffn_dim': 10240, 'word_embed_proj_dim': 2560}
_OPT_6_7B = _OPT | {'hidden_size': 4096, 'ffn_dim': 16384, 'word_embed_proj_dim': 4096}
_T5 = {'model_type': 't5', 'vocab_size': 32128, 'd_kv': 64, 'num_layers': 24, 'feed_forward_proj': 'gated-gelu'}
_T5 |= {
    'dense_act_fn': 'gelu',
    'tie_word_embeddings': False,
    'decoder_start_token_id': 0,
}  # exact GELU, as BLIP-2's say
_T5_XL = _T5 | {'d_model': 2048, 'd_ff': 5120, 'num_heads': 32}
_T5_XXL = _T5 | {'d_model': 4096, 'd_ff': 10240, 'num_heads': 64}
_LLAMA_7B = {'model_type': 'llama', 'hidden_size': 4096, 'intermediate_size': 11008, 'num_hidden_layers': 32}
_LLAMA_7B |= {'num_attention_heads': 32}
_LLAMA_13B = {'model_type': 'llama', 'hidden_size': 5120, 'intermediate_size': 13824, 'num_hidden_layers': 40}
_LLAMA_13B |= {'num_attention_heads': 40}
_VICUNA = {'vocab_size': 32001, 'rms_norm_eps': 1e-6, 'max_position_embeddings': 2048}
_LLAVA = {'vocab_size': 32064, 'rms_norm_eps': 1e-5, 'max_position_embeddings': 4096}
_QFORMER = {'vocab_size': 30523}  # BERT's, and a token of its own
_CLIP = {'model_type': 'clip_vision_model', 'hidden_size': 1024, 'intermediate_size': 4096, 'num_hidden_layers': 24}
_CLIP |= {'num_attention_heads': 16, 'image_size': 336, 'patch_size': 14, 'projection_dim': 768, 'vocab_size': 32000}
_SIGLIP = {'model_type': 'siglip_vision_model', 'hidden_size': 1152, 'intermediate_size': 4304}
_SIGLIP |= {'num_hidden_layers': 27, 'num_attention_heads': 16, 'image_size': 224, 'patch_size': 14}
_SIGLIP |= {'vision_use_head': False, 'projection_dim': 2048}
_GEMMA = {'model_type': 'gemma', 'vocab_size': 257216, 'hidden_size': 2048, 'intermediate_size': 16384}
_GEMMA |= {'num_hidden_layers': 18, 'num_attention_heads': 8, 'num_key_value_heads': 1, 'head_dim': 256}
_SMOLLM2 = {'vocab_size': 49152, 'hidden_size': 576, 'intermediate_size': 1536, 'num_hidden_layers': 30}
_SMOLLM2 |= {'num_attention_heads': 9, 'num_key_value_heads': 3, 'tie_word_embeddings': True, 'rms_norm_eps': 1e-5}
_SMOLLM2 |= {'max_position_embeddings': 8192, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 100000.0}}


def _blip2(text: dict, image_token: int) -> tuple[str, dict]:
    return 'Blip2Config', {'text_config': text, 'image_token_index': image_token}


def _instructblip(text: dict, image_token: int) -> tuple[str, dict]:
    fields = {'text_config': text, 'image_token_index': image_token, 'qformer_config': _QFORMER}
    return 'InstructBlipConfig', fields


def _llava(text: dict) -> tuple[str, dict]:
    fields = {'text_config': text, 'vision_config': _CLIP, 'image_token_index': 32000}
    return 'LlavaConfig', fields


_PALIGEMMA = {'text_config': _GEMMA, 'vision_config': _SIGLIP, 'image_token_index': 257152, 'vocab_size': 257216}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    'Salesforce/blip2-opt-2.7b': _blip2(_OPT_2_7B, 50265),
    'Salesforce/blip2-opt-6.7b': _blip2(_OPT_6_7B, 50265),
    'Salesforce/blip2-flan-t5-xl': _blip2(_T5_XL, 32100),
    'Salesforce/blip2-flan-t5-xxl': _blip2(_T5_XXL, 32100),
    'Salesforce/instructblip-flan-t5-xl': _instructblip(_T5_XL, 32100),
    'Salesforce/instructblip-flan-t5-xxl': _instructblip(_T5_XXL, 32100),
    'Salesforce/instructblip-vicuna-7b': _instructblip(_LLAMA_7B | _VICUNA, 32000),
    'Salesforce/instructblip-vicuna-13b': _instructblip(_LLAMA_13B | _VICUNA, 32000),
    'llava-hf/llava-1.5-7b-hf': _llava(_LLAMA_7B | _LLAVA),
    'llava-hf/llava-1.5-13b-hf': _llava(_LLAMA_13B | _LLAVA),
    'google/paligemma-3b-pt-224': ('PaliGemmaConfig', _PALIGEMMA),
    'meta-llama/Llama-2-7b-hf': ('LlamaConfig', _LLAMA_7B | {'vocab_size': 32000, 'max_position_embeddings': 4096}),
    'HuggingFaceTB/SmolLM2-135M': ('LlamaConfig', _SMOLLM2),
}


def config_of(hub_id: str) -> Any:
    """The transformers config of a published checkpoint.

    Raises:
      UnsupportedModelError: the table has no such id.
    """
    import transformers

    if hub_id not in CONFIGS:
        raise UnsupportedModelError(f'{hub_id!r} is none of the published checkpoints: {", ".join(CONFIGS)}')
    kind, fields = CONFIGS[hub_id]
    return getattr(transformers, kind)(**{name: _copied(value) for name, value in fields.items()})


def find_config(name: str, *, others: Sequence[str] = (), family: str = '') -> Any:
    """The transformers config of a directory, of a published checkpoint (no network), or of another one on the hub.

    Args:
      others: names that the caller would have known too, for the error's guess at what was meant.
      family: a family to read it by, as `package.module:FAMILY`; '' for the one registered for its `model_type`.

    Raises:
      StorageError: there is no such directory, nor does the hub give it; or its config.json is not one.
      UnsupportedModelError: no family knows its kind.
    """
    if Path(name).is_dir():
        if not (Path(name) / 'config.json').is_file():
            raise StorageError(f'{name}: holds no config.json; give the directory of one model')
        return read_config(Path(name), family)
    if name in CONFIGS:
        return config_of(name)
    if (file := _from_hub(name)) is None:
        nearest = difflib.get_close_matches(name, [*CONFIGS, *others], 1)
        hint = f'; did you mean {nearest[0]}?' if nearest else ''
        raise StorageError(
            f'{name}: no such directory, none of the published checkpoints known here, and its config.json is not to '
            f'be had from the hub (owner/name){hint}'
        )
    return read_config(file.parent, family)


def _from_hub(name: str) -> Path | None:
    import huggingface_hub as hub

    if name.count('/') != 1:
        return None
    try:
        try:
            return Path(hub.hf_hub_download(name, 'config.json', local_files_only=True))
        except hub.errors.LocalEntryNotFoundError:
            hub.get_hf_file_metadata(hub.hf_hub_url(name, 'config.json'))  # gives up at once where there is no network
            return Path(hub.hf_hub_download(name, 'config.json'))
    except Exception:  # wrong ids, HTTP and connection errors, a gated repository: of many classes
        return None


def _copied(value: Any) -> Any:
    return {name: _copied(part) for name, part in value.items()} if isinstance(value, dict) else value


def model_config(hf: Any, family: str = '') -> Any:
    """Our config of a transformers config without its weights: the head of a T5 1.1 is taken to be its own.

    Raises:
      UnsupportedModelError: no family knows the model, or a field's value.
    """
    cfg = from_hf(hf, family)
    tied = cfg.language.tower.likely_tied(cfg.language)
    return replace(cfg, language=replace(cfg.language, tied=tied))
