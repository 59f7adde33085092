"""Tiny random models of every family, with prompts to generate from."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers as hf

from sparselora_jax.evaluation.generate import generate
from sparselora_jax.models.model import Generation, Model, from_hf

ROWS, WORDS, NEW, VOCAB, IMAGE, PAD = 200, 6, 10, 60, 58, 1
QUERIES, PATCHES = 3, 4  # soft words of an image: with a Q-Former, and without
SIZES = {'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 4}
VISION = {'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2, 'num_attention_heads': 2}
VISION |= {'image_size': 8, 'patch_size': 4}
QFORMER = {'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2, 'num_attention_heads': 2}
QFORMER |= {'vocab_size': 20, 'max_position_embeddings': 12, 'encoder_hidden_size': 16}
TEXT = {'vocab_size': VOCAB, 'max_position_embeddings': 128, 'bos_token_id': 3, 'pad_token_id': PAD}
IMAGES = {'num_query_tokens': QUERIES, 'image_token_index': IMAGE, 'vision_config': VISION, 'qformer_config': QFORMER}


def llama_config():
    return hf.LlamaConfig(**TEXT, **SIZES, num_key_value_heads=2)


def opt_config():
    sizes = {'hidden_size': 32, 'word_embed_proj_dim': 32, 'ffn_dim': 48, 'num_hidden_layers': 2}
    return hf.OPTConfig(**TEXT, **sizes, num_attention_heads=4)


def t5_config():
    sizes = {'d_model': 32, 'd_kv': 6, 'd_ff': 48, 'num_layers': 2, 'num_heads': 4}
    options = {'feed_forward_proj': 'gated-gelu', 'decoder_start_token_id': 0, 'pad_token_id': 0, 'bos_token_id': 3}
    return hf.T5Config(vocab_size=VOCAB, **sizes, **options)


def llava_config():
    vision = hf.CLIPVisionConfig(**VISION, projection_dim=12)
    images = {'image_token_index': IMAGE, 'image_seq_length': PATCHES}
    return hf.LlavaConfig(vision_config=vision, text_config=llama_config(), **images)


def paligemma_config():
    vision = hf.SiglipVisionConfig(**VISION, vision_use_head=False)
    text = hf.GemmaConfig(**TEXT, **SIZES, num_key_value_heads=1, head_dim=16)
    return hf.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32, hidden_size=32
    )


FAMILIES = {
    'llama': (hf.LlamaForCausalLM, llama_config),
    'opt': (hf.OPTForCausalLM, opt_config),
    'llava': (hf.LlavaForConditionalGeneration, llava_config),
    'paligemma': (hf.PaliGemmaForConditionalGeneration, paligemma_config),
    'blip-2 opt': (
        hf.Blip2ForConditionalGeneration,
        lambda: hf.Blip2Config(**IMAGES, text_config=opt_config().to_dict()),
    ),
    'blip-2 t5': (
        hf.Blip2ForConditionalGeneration,
        lambda: hf.Blip2Config(**IMAGES, text_config=t5_config().to_dict()),
    ),
    'instructblip t5': (
        hf.InstructBlipForConditionalGeneration,
        lambda: hf.InstructBlipConfig(**IMAGES, text_config=t5_config().to_dict()),
    ),
    'instructblip llama': (
        hf.InstructBlipForConditionalGeneration,
        lambda: hf.InstructBlipConfig(**IMAGES, text_config=llama_config().to_dict()),
    ),
}


class Case(NamedTuple):
    """torch's model, ours, our params; a batch of `ROWS` prompts."""

    oracle: Any
    model: Model
    params: dict
    batch: dict

    def theirs(self, batch=None, **options):
        with torch.no_grad():
            given = {name: torch.asarray(array) for name, array in (batch or self.batch).items()}
            return self.oracle.generate(**given, **options).numpy()

    def ours(self, batch=None, **options):
        return generate(self.model, self.params, batch or self.batch, **options)

    @property
    def prompt(self):
        """How many tokens of the output were given."""
        return 1 if self.model.is_encoder_decoder else self.batch['input_ids'].shape[1]


def prompts(model):
    """Random prompts, with pads before the words as each family's processor puts them, and some between them."""
    rng = np.random.default_rng(0)
    pads = rng.integers(0, WORDS, ROWS)
    mask = (np.arange(WORDS) >= pads[:, None]) & ((rng.random((ROWS, WORDS)) > 0.1) | (np.arange(WORDS) == WORDS - 1))
    words = np.where(mask, rng.integers(4, IMAGE, mask.shape), model.generation.pad)
    batch = {'input_ids': words, 'attention_mask': mask.astype(np.int64)}
    if not hasattr(model.cfg, 'vision'):
        return batch
    batch['pixel_values'] = rng.normal(size=(ROWS, 3, 8, 8)).astype(np.float32)
    count = QUERIES if hasattr(model.cfg, 'qformer') else PATCHES
    images = np.full((ROWS, count), IMAGE)
    batch['input_ids'] = np.concatenate([images, words], axis=1)
    batch['attention_mask'] = np.concatenate([np.ones_like(images), batch['attention_mask']], axis=1)
    if not hasattr(model.cfg, 'qformer'):
        if model.cfg.language.norm_offset:
            batch['token_type_ids'] = np.zeros_like(batch['input_ids'])
    elif model.cfg.qformer.vocab:
        batch['qformer_input_ids'] = rng.integers(0, 20, (ROWS, 5))
        batch['qformer_attention_mask'] = (np.arange(5) <= rng.integers(0, 5, ROWS)[:, None]).astype(np.int64)
    return batch


def build(name, perturbed, from_torch):
    kind, config = FAMILIES[name]
    torch.manual_seed(0)
    oracle = perturbed(kind(config()))
    cfg = from_hf(oracle.config)
    speaker = oracle.language_model if hasattr(cfg, 'qformer') else oracle
    with torch.no_grad():
        words = speaker.get_output_embeddings().weight
        words.mul_(2.0)  # sharper: otherwise many of the best tokens are near ties
        words[IMAGE] = 0.0  # never written: where rows differ they are read again, and one more image would be refused
    speaker.generation_config.eos_token_id = None
    pad = 0 if speaker.config.model_type == 't5' else PAD
    model = Model(cfg, Generation(eos=(), pad=pad, start=0, bos=3))
    params = from_torch(oracle.state_dict(), model.family.keys(cfg), model.shapes())
    case = Case(oracle, model, params, prompts(model))
    # The two words that most rows write later than at once end a sequence.
    written = case.theirs(max_new_tokens=NEW)[:, case.prompt + 1 :]
    rows = [(written == token).any(axis=1).sum() for token in range(4, IMAGE)]
    eos = tuple(4 + int(token) for token in np.argsort(rows)[-2:])
    speaker.generation_config.eos_token_id = list(eos)
    return case._replace(model=replace(model, generation=replace(model.generation, eos=eos)))
