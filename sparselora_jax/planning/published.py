"""Configs of published checkpoints, to check recipes against real shapes without a network.

Fields at the default of transformers' config classes (BLIP-2's vision tower and Q-Former) are left out. The sizes of
ViT-g, the Q-Formers, OPT, FlanT5, Vicuna, CLIP and Gemma are the papers'.

Revisions of a checkpoint may differ from this table:

- Vocabulary. BLIP-2 OPT: 50272 as first published, 50304 (here) since the image token 50265 got a row of its own.
  InstructBLIP Vicuna: 32000 of LLaMA, 32001 (here) with a pad token. LLaVA-1.5: 32000, or 32064 (here) with image and
  pad tokens, padded. PaliGemma: 257152 in transformers' defaults, 257216 (here) with the image token's row, padded.
- Heads. Transformers 5 reports the head of every T5 as tied to the word embedding, but FlanT5's files hold a separate
  head. In transformers 5 the field for this in a T5's file decides whether the head is scaled; `model_config` reads it
  the same way.
- LLaVA's files also hold CLIP's last layer and final norm, which nothing reads.

Two groups of values were not checked against the hub. Image tokens, epsilons and lengths of positions do not change a
shape. The padded vocabularies of OPT and LLaVA do. Transformers' conversion scripts give the Q-Former's 30523, Vicuna's
32001, PaliGemma's sizes, and the exact GELU of BLIP-2's FlanT5.
"""

import copy
import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

from sparselora_jax.checkpoints.load import read_config
from sparselora_jax.models.config import FamilyConfig
from sparselora_jax.models.model import from_hf
from sparselora_jax.runtime.errors import UnsupportedModelError
from sparselora_jax.runtime.files import StorageError

# Language models.
_OPT = {
    'model_type': 'opt',
    'vocab_size': 50304,
    'num_attention_heads': 32,
    'num_hidden_layers': 32,
}
_OPT_2_7B = _OPT | {'hidden_size': 2560, 'ffn_dim': 10240, 'word_embed_proj_dim': 2560}
_OPT_6_7B = _OPT | {'hidden_size': 4096, 'ffn_dim': 16384, 'word_embed_proj_dim': 4096}
_T5 = {
    'model_type': 't5',
    'vocab_size': 32128,
    'd_kv': 64,
    'num_layers': 24,
    'feed_forward_proj': 'gated-gelu',
    'dense_act_fn': 'gelu',  # the exact GELU, as in BLIP-2's files; gated-gelu alone means its tanh form
    'tie_word_embeddings': False,
    'decoder_start_token_id': 0,
}
_T5_XL = _T5 | {'d_model': 2048, 'd_ff': 5120, 'num_heads': 32}
_T5_XXL = _T5 | {'d_model': 4096, 'd_ff': 10240, 'num_heads': 64}
_LLAMA_7B = {
    'model_type': 'llama',
    'hidden_size': 4096,
    'intermediate_size': 11008,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
}
_LLAMA_13B = {
    'model_type': 'llama',
    'hidden_size': 5120,
    'intermediate_size': 13824,
    'num_hidden_layers': 40,
    'num_attention_heads': 40,
}
# Fields that checkpoints derived from LLaMA change.
_VICUNA = {'vocab_size': 32001, 'rms_norm_eps': 1e-6, 'max_position_embeddings': 2048}
_LLAVA_TEXT = {'vocab_size': 32064, 'rms_norm_eps': 1e-5, 'max_position_embeddings': 4096}
_LLAMA_2 = {'vocab_size': 32000, 'max_position_embeddings': 4096}
_GEMMA = {
    'model_type': 'gemma',
    'vocab_size': 257216,
    'hidden_size': 2048,
    'intermediate_size': 16384,
    'num_hidden_layers': 18,
    'num_attention_heads': 8,
    'num_key_value_heads': 1,
    'head_dim': 256,
}
_SMOLLM2 = {
    'vocab_size': 49152,
    'hidden_size': 576,
    'intermediate_size': 1536,
    'num_hidden_layers': 30,
    'num_attention_heads': 9,
    'num_key_value_heads': 3,
    'tie_word_embeddings': True,
    'rms_norm_eps': 1e-5,
    'max_position_embeddings': 8192,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 100000.0},
}

# Vision towers and Q-Formers.
_QFORMER = {'vocab_size': 30523}  # BERT's 30522, and one token of its own
_CLIP = {
    'model_type': 'clip_vision_model',
    'hidden_size': 1024,
    'intermediate_size': 4096,
    'num_hidden_layers': 24,
    'num_attention_heads': 16,
    'image_size': 336,
    'patch_size': 14,
    'projection_dim': 768,
    'vocab_size': 32000,
}
_SIGLIP = {
    'model_type': 'siglip_vision_model',
    'hidden_size': 1152,
    'intermediate_size': 4304,
    'num_hidden_layers': 27,
    'num_attention_heads': 16,
    'image_size': 224,
    'patch_size': 14,
    'vision_use_head': False,
    'projection_dim': 2048,
}

# A class of transformers' configs and its arguments.
_Published = tuple[str, dict[str, Any]]


def _blip2(text: dict, image_token: int) -> _Published:
    return 'Blip2Config', {'text_config': text, 'image_token_index': image_token}


def _blip2_retrieval(image_size: int) -> _Published:
    fields = {
        'architectures': ['Blip2ForImageTextRetrieval'],
        'vision_config': {'image_size': image_size},
        'qformer_config': _QFORMER | {'use_qformer_text_input': True},
    }
    return 'Blip2Config', fields


def _instructblip(text: dict, image_token: int) -> _Published:
    fields = {'text_config': text, 'image_token_index': image_token, 'qformer_config': _QFORMER}
    return 'InstructBlipConfig', fields


def _llava(text: dict) -> _Published:
    fields = {'text_config': text, 'vision_config': _CLIP, 'image_token_index': 32000}
    return 'LlavaConfig', fields


_PALIGEMMA = {'text_config': _GEMMA, 'vision_config': _SIGLIP, 'image_token_index': 257152, 'vocab_size': 257216}

CONFIGS: dict[str, _Published] = {
    'Salesforce/blip2-opt-2.7b': _blip2(_OPT_2_7B, 50265),
    'Salesforce/blip2-opt-6.7b': _blip2(_OPT_6_7B, 50265),
    'Salesforce/blip2-flan-t5-xl': _blip2(_T5_XL, 32100),
    'Salesforce/blip2-flan-t5-xxl': _blip2(_T5_XXL, 32100),
    'Salesforce/blip2-itm-vit-g': _blip2_retrieval(224),
    'Salesforce/blip2-itm-vit-g-coco': _blip2_retrieval(364),
    'Salesforce/instructblip-flan-t5-xl': _instructblip(_T5_XL, 32100),
    'Salesforce/instructblip-flan-t5-xxl': _instructblip(_T5_XXL, 32100),
    'Salesforce/instructblip-vicuna-7b': _instructblip(_LLAMA_7B | _VICUNA, 32000),
    'Salesforce/instructblip-vicuna-13b': _instructblip(_LLAMA_13B | _VICUNA, 32000),
    'llava-hf/llava-1.5-7b-hf': _llava(_LLAMA_7B | _LLAVA_TEXT),
    'llava-hf/llava-1.5-13b-hf': _llava(_LLAMA_13B | _LLAVA_TEXT),
    'google/paligemma-3b-pt-224': ('PaliGemmaConfig', _PALIGEMMA),
    'meta-llama/Llama-2-7b-hf': ('LlamaConfig', _LLAMA_7B | _LLAMA_2),
    'HuggingFaceTB/SmolLM2-135M': ('LlamaConfig', _SMOLLM2),
}


def config_of(hub_id: str) -> transformers.PretrainedConfig:
    """Return the transformers config of a published checkpoint.

    Args:
      hub_id: a key of `CONFIGS`.

    Raises:
      UnsupportedModelError: the table does not have this id.
    """
    if hub_id not in CONFIGS:
        raise UnsupportedModelError(f'{hub_id!r} is none of the published checkpoints: {", ".join(CONFIGS)}')
    kind, fields = CONFIGS[hub_id]
    # Copied, since config classes keep the dicts that they are given and modify them.
    return getattr(transformers, kind)(**copy.deepcopy(fields))


def find_config(name: str, *, others: Sequence[str] = (), family: str = '') -> transformers.PretrainedConfig:
    """Return the transformers config of a directory, of a published checkpoint (no network), or of a hub id.

    Args:
      name: the directory, or `owner/name`.
      others: further names that the caller accepts, for the "did you mean" hint of the error.
      family: see `checkpoints.load.load_model`.

    Raises:
      StorageError: there is no such directory and the hub does not give it, or its config.json is not one.
      UnsupportedModelError: no family supports its `model_type`, or it is of another family than `family`.
    """
    if Path(name).is_dir():
        if not (Path(name) / 'config.json').is_file():
            raise StorageError(f'{name}: holds no config.json; give the directory of one model')
        return read_config(Path(name), family)
    if name in CONFIGS:
        return config_of(name)
    file = _from_hub(name)
    if file is None:
        nearest = difflib.get_close_matches(name, [*CONFIGS, *others], 1)
        hint = f'; did you mean {nearest[0]}?' if nearest else ''
        raise StorageError(
            f'{name}: no such directory, none of the published checkpoints known here, and the hub (owner/name) does '
            f'not give its config.json{hint}'
        )
    return read_config(file.parent, family)


def _from_hub(name: str) -> Path | None:
    """Return the config.json of a hub id, downloaded or from the cache, or None if neither works."""
    import huggingface_hub as hub

    if name.count('/') != 1:
        return None
    try:
        try:
            return Path(hub.hf_hub_download(name, 'config.json', local_files_only=True))
        except hub.errors.LocalEntryNotFoundError:
            # Request the metadata first: without a network this fails at once, while a download retries many times.
            hub.get_hf_file_metadata(hub.hf_hub_url(name, 'config.json'))
            return Path(hub.hf_hub_download(name, 'config.json'))
    except Exception:
        # Wrong ids, HTTP and connection errors, a gated repository: the hub raises many classes, which have no base.
        return None


def model_config(hf: transformers.PretrainedConfig, family: str = '') -> FamilyConfig:
    """Convert a transformers config to ours, without weights; the head of a T5 1.1 is assumed to be separate.

    Args:
      hf: the transformers config.
      family: see `find_config`.

    Raises:
      UnsupportedModelError: no family supports the model, or a field's value.
    """
    cfg = from_hf(hf, family)
    if cfg.language is None:
        return cfg
    tied = cfg.language.tower.likely_tied(cfg.language)
    return replace(cfg, language=replace(cfg.language, tied=tied))
