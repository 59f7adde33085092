"""Small random models of torch's real classes, as real Hugging Face directories."""

import logging
import warnings

import numpy as np
import torch
import transformers as t

IMAGE, QUERIES = 38, 5
TEXT = {'vocab_size': 40, 'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 4}
LLAMA = TEXT | {'intermediate_size': 48, 'num_key_value_heads': 2, 'max_position_embeddings': 64}
OPT = TEXT | {'ffn_dim': 48, 'word_embed_proj_dim': 32, 'max_position_embeddings': 64}
T5 = {'vocab_size': 40, 'd_model': 32, 'd_kv': 6, 'd_ff': 48, 'num_layers': 2, 'num_heads': 4}
VISION = {'hidden_size': 24, 'intermediate_size': 40, 'num_hidden_layers': 2, 'num_attention_heads': 4}
VISION |= {'image_size': 16, 'patch_size': 4}
QFORMER = {'hidden_size': 16, 'intermediate_size': 28, 'num_hidden_layers': 4, 'num_attention_heads': 2}
QFORMER |= {'vocab_size': 20, 'max_position_embeddings': 12, 'encoder_hidden_size': 24}


def _blip2(text, kind=t.Blip2Config, **changes):
    parts = {'vision_config': VISION, 'qformer_config': QFORMER, 'text_config': text.to_dict()}
    return kind(**parts, num_query_tokens=QUERIES, image_token_index=IMAGE, **changes)


def _t5():
    return t.T5Config(**T5, feed_forward_proj='gated-gelu', decoder_start_token_id=0)


def _llava():
    vision, text = t.CLIPVisionConfig(**VISION, projection_dim=8), t.LlamaConfig(**LLAMA)
    return t.LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=IMAGE)


def _paligemma():
    vision = t.SiglipVisionConfig(**VISION | {'projection_dim': 32, 'vision_use_head': False})
    text = t.GemmaConfig(**LLAMA, head_dim=12)
    parts = {'vision_config': vision.to_dict(), 'text_config': text.to_dict()}
    return t.PaliGemmaConfig(**parts, image_token_index=IMAGE, projection_dim=32, hidden_size=32)


CONFIGS = {
    'llama': lambda: t.LlamaConfig(**LLAMA),
    'tied llama': lambda: t.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    'opt': lambda: t.OPTConfig(**OPT),
    'blip2 opt': lambda: _blip2(t.OPTConfig(**OPT)),
    'blip2 t5': lambda: _blip2(_t5()),
    'instructblip t5': lambda: _blip2(_t5(), t.InstructBlipConfig),
    'instructblip llama': lambda: _blip2(t.LlamaConfig(**LLAMA), t.InstructBlipConfig),
    'llava': _llava,
    'paligemma': _paligemma,
}
CLASSES = {
    t.LlamaConfig: t.LlamaForCausalLM,
    t.OPTConfig: t.OPTForCausalLM,
    t.Blip2Config: t.Blip2ForConditionalGeneration,
    t.InstructBlipConfig: t.InstructBlipForConditionalGeneration,
    t.LlavaConfig: t.LlavaForConditionalGeneration,
    t.PaliGemmaConfig: t.PaliGemmaForConditionalGeneration,
}


def build(name, perturbed):
    """A torch model, all its parameters perturbed."""
    config = CONFIGS[name]()
    torch.manual_seed(0)
    return perturbed(CLASSES[type(config)](config), 0.2)  # T5's unscaled attention makes more of rounding than 1e-4


def load(folder, kind):
    """Torch's own reading of a directory, which must find it as it should be and warn of nothing."""
    said, handler = [], logging.Handler(logging.WARNING)
    handler.emit = said.append
    t.logging.add_handler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            model, info = kind.from_pretrained(folder, output_loading_info=True)
    finally:
        t.logging.remove_handler(handler)
    assert not said, [record.getMessage() for record in said]
    assert not {what: list(names) for what, names in info.items() if names}
    return model.eval()


def batch(model):
    """Three rows for one of our models: an image's tokens, then eight words."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 38, (3, 8))
    if set(model.shapes()) == {'language'}:
        return {'input_ids': ids}
    images = QUERIES if 'qformer' in model.shapes() else 16
    ids = np.concatenate([np.full((3, images), IMAGE), ids], axis=1)
    made = {'pixel_values': rng.normal(size=(3, 3, 16, 16)).astype(np.float32), 'input_ids': ids}
    made['attention_mask'] = np.ones_like(ids)
    if 'qformer' in model.shapes() and model.cfg.qformer.vocab:
        made['qformer_input_ids'] = rng.integers(0, 20, (3, 7))
        made['qformer_attention_mask'] = np.ones((3, 7), ids.dtype)
    if type(model.cfg).__name__ == 'PaliGemmaConfig':
        made['token_type_ids'] = np.where(np.arange(ids.shape[1]) < 20, 0, np.ones_like(ids))
    if model.is_encoder_decoder:
        made['decoder_input_ids'] = rng.integers(0, 38, (3, 5))
    return made


def logits(module, given):
    """Torch's."""
    with torch.no_grad():
        return module(**{name: torch.asarray(array) for name, array in given.items()}).logits.float().numpy()
