"""Convert our configs to transformers' configs, for models that were not read from a directory (`write_new`)."""

from typing import Any

from sparselora_jax.models import blip2, llama
from sparselora_jax.models.model import Generation
from sparselora_jax.runtime.errors import UnsupportedModelError


def llama_config(cfg: llama.LlamaConfig, generation: Generation) -> Any:
    """Return transformers' `LlamaConfig` for a LLaMA.

    Args:
      cfg: our config.
      generation: the special tokens.

    Raises:
      UnsupportedModelError: a field has a value that only a Gemma or a Mistral has, or rotary positions are scaled in
        two ways; the message names the field.
    """
    from transformers import LlamaConfig

    # A LLaMA's values of the fields that our config only has for Gemma and Mistral.
    for name, plain in {'norm_offset': 0.0, 'embed_scale': 1.0, 'window': None}.items():
        value = getattr(cfg, name)
        if value != plain:
            raise UnsupportedModelError(
                f"{name} {value}: transformers' LlamaConfig has no field for it, expected {plain}"
            )
    eos = list(generation.eos)
    return LlamaConfig(
        architectures=['LlamaForCausalLM'],
        vocab_size=cfg.vocab,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        head_dim=cfg.head_dim,  # may differ from the width divided by the number of heads
        intermediate_size=cfg.mlp_width,
        hidden_act=cfg.activation,
        attention_bias=cfg.attention_bias,
        mlp_bias=cfg.mlp_bias,
        rope_parameters=_rope_parameters(cfg),
        rms_norm_eps=cfg.norm_eps,
        max_position_embeddings=cfg.max_positions,
        tie_word_embeddings=cfg.tied,
        bos_token_id=generation.bos,
        eos_token_id=eos if len(eos) > 1 else (*eos, None)[0],  # a list of several, one number, or None
        pad_token_id=generation.pad,
    )


def _rope_parameters(cfg: llama.LlamaConfig) -> dict[str, Any]:
    """Return transformers' description of the rotary positions.

    Raises:
      UnsupportedModelError: the positions are scaled in two ways at once.
    """
    # transformers reads one `rope_type`; each type has its own fields.
    parameters: dict[str, Any] = {'rope_theta': cfg.rope_base}
    stretch = cfg.rope_llama3
    if stretch is None and cfg.rope_linear == 1.0:
        return parameters | {'rope_type': 'default'}
    if stretch is None:
        return parameters | {'rope_type': 'linear', 'factor': cfg.rope_linear}
    if cfg.rope_linear != 1.0:
        raise UnsupportedModelError(
            f'rope_linear {cfg.rope_linear} beside rope_llama3: a LlamaConfig names one of them'
        )
    return parameters | {
        'rope_type': 'llama3',
        'factor': stretch.factor,
        'low_freq_factor': stretch.low_freq_factor,
        'high_freq_factor': stretch.high_freq_factor,
        'original_max_position_embeddings': stretch.original_max_positions,
    }


def blip2_config(cfg: blip2.Blip2Config, generation: Generation) -> Any:
    """Return transformers' `Blip2Config` for a model whose language tower is a LLaMA.

    Args:
      cfg: our config.
      generation: the special tokens.

    Raises:
      UnsupportedModelError: see `llama_config`.
    """
    from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig

    # Omitted fields have transformers' defaults, which match what our towers compute.
    vision = Blip2VisionConfig(
        hidden_size=cfg.vision.width,
        intermediate_size=cfg.vision.mlp_width,
        num_hidden_layers=cfg.vision.depth,
        num_attention_heads=cfg.vision.heads,
        image_size=cfg.vision.image_size,
        patch_size=cfg.vision.patch_size,
        hidden_act=cfg.vision.activation,
        layer_norm_eps=cfg.vision.norm_eps,
        qkv_bias=cfg.vision.qkv_bias,
    )
    qformer = Blip2QFormerConfig(
        hidden_size=cfg.qformer.width,
        num_hidden_layers=2 * cfg.qformer.pairs,  # our layers are stacked in pairs: every second layer reads the image
        num_attention_heads=cfg.qformer.heads,
        intermediate_size=cfg.qformer.mlp_width,
        encoder_hidden_size=cfg.qformer.image_width,
        hidden_act=cfg.qformer.activation,
        layer_norm_eps=cfg.qformer.norm_eps,
    )
    return Blip2Config(
        architectures=['Blip2ForConditionalGeneration'],
        # Passed as dicts, since transformers reads the kind of each part from its `model_type`.
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=llama_config(cfg.language, generation).to_dict(),
        num_query_tokens=cfg.qformer.queries,
        image_token_index=cfg.image_token,
        tie_word_embeddings=cfg.language.tied,
    )
