"""Our configs -> transformers' own, for models that were read from no directory of its kind (`hf_new.write_new`)."""

from typing import Any

from sparselora_jax.models import blip2, llama
from sparselora_jax.models.model import Generation
from sparselora_jax.runtime.errors import UnsupportedModelError


def llama_config(cfg: llama.LlamaConfig, generation: Generation) -> Any:
    """The `LlamaConfig` of a LLaMA.

    Raises:
      UnsupportedModelError: names the field that only a Gemma or a Mistral has, or two stretches of rotary positions.
    """
    from transformers import LlamaConfig

    for name, plain in {'norm_offset': 0.0, 'embed_scale': 1.0, 'window': None}.items():
        if (value := getattr(cfg, name)) != plain:
            raise UnsupportedModelError(
                f"{name} {value}: transformers' LlamaConfig has no field for it, expected {plain}"
            )
    return LlamaConfig(
        architectures=['LlamaForCausalLM'],
        vocab_size=cfg.vocab,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        head_dim=cfg.head_dim,
        intermediate_size=cfg.mlp_width,
        hidden_act=cfg.activation,
        attention_bias=cfg.attention_bias,
        mlp_bias=cfg.mlp_bias,
        rope_parameters=_rope_parameters(cfg),
        rms_norm_eps=cfg.norm_eps,
        max_position_embeddings=cfg.max_positions,
        tie_word_embeddings=cfg.tied,
        bos_token_id=generation.bos,
        eos_token_id=list(generation.eos) if len(generation.eos) > 1 else (*generation.eos, None)[0],
        pad_token_id=generation.pad,
    )


def _rope_parameters(cfg: llama.LlamaConfig) -> dict[str, Any]:
    base, linear, stretch = {'rope_theta': cfg.rope_base}, cfg.rope_linear, cfg.rope_llama3
    if stretch is None:
        return base | ({'rope_type': 'default'} if linear == 1.0 else {'rope_type': 'linear', 'factor': linear})
    if linear != 1.0:
        raise UnsupportedModelError(f'rope_linear {linear} beside rope_llama3: a LlamaConfig names one of them')
    return base | {
        'rope_type': 'llama3',
        'factor': stretch.factor,
        'low_freq_factor': stretch.low_freq_factor,
        'high_freq_factor': stretch.high_freq_factor,
        'original_max_position_embeddings': stretch.original_max_positions,
    }


def blip2_config(cfg: blip2.Blip2Config, generation: Generation) -> Any:
    """The `Blip2Config` of a model whose language tower is a LLaMA.

    Raises:
      UnsupportedModelError: see `llama_config`.
    """
    from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig

    v, q = cfg.vision, cfg.qformer
    vision = Blip2VisionConfig(
        hidden_size=v.width,
        intermediate_size=v.mlp_width,
        num_hidden_layers=v.depth,
        num_attention_heads=v.heads,
        image_size=v.image_size,
        patch_size=v.patch_size,
        hidden_act=v.activation,
        layer_norm_eps=v.norm_eps,
        qkv_bias=v.qkv_bias,
    )
    qformer = Blip2QFormerConfig(
        hidden_size=q.width,
        num_hidden_layers=2 * q.pairs,
        num_attention_heads=q.heads,
        intermediate_size=q.mlp_width,
        encoder_hidden_size=q.image_width,
        hidden_act=q.activation,
        layer_norm_eps=q.norm_eps,
    )
    return Blip2Config(
        architectures=['Blip2ForConditionalGeneration'],
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=llama_config(cfg.language, generation).to_dict(),
        num_query_tokens=q.queries,
        image_token_index=cfg.image_token,
        tie_word_embeddings=cfg.language.tied,
    )
