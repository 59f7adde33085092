"""Our configs -> transformers' own, for models that were read from no directory of its kind (`hf_new.write_new`)."""

from typing import Any

from sparselora_jax.models import blip2, llama
from sparselora_jax.models.model import Generation


def llama_config(cfg: llama.LlamaConfig, generation: Generation) -> Any:
    """The `LlamaConfig` of a LLaMA with plain rotary positions."""
    from transformers import LlamaConfig

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
        rope_parameters={'rope_type': 'default', 'rope_theta': cfg.rope_base},
        rms_norm_eps=cfg.norm_eps,
        max_position_embeddings=cfg.max_positions,
        tie_word_embeddings=cfg.tied,
        bos_token_id=generation.bos,
        eos_token_id=list(generation.eos) if len(generation.eos) > 1 else (*generation.eos, None)[0],
        pad_token_id=generation.pad,
    )


def blip2_config(cfg: blip2.Blip2Config, generation: Generation) -> Any:
    """The `Blip2Config` of a model whose language tower is a LLaMA."""
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
