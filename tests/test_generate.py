"""Token for token what transformers' `generate` gives, over every family; nothing large is copied a token."""

import re
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf

import sparselora_jax as sl
from sparselora_jax.generate import GenerationError, generate
from sparselora_jax.generation import decode, search
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
        return 1 if self.model.encoder_decoder else self.batch['input_ids'].shape[1]


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


@pytest.fixture(scope='module')
def cases(perturbed, from_torch):
    """A family's `Case`, made when it is first asked for."""
    made = {}

    def case(name):
        if name not in made:
            kind, config = FAMILIES[name]
            made[name] = build(kind(config()), perturbed, from_torch)
        return made[name]

    return case


def build(oracle, perturbed, from_torch):
    oracle, config = perturbed(oracle), from_hf(oracle.config)
    speaker = oracle.language_model if hasattr(config, 'qformer') else oracle
    with torch.no_grad():  # sharper: otherwise many of the best tokens are near ties
        speaker.get_output_embeddings().weight.mul_(2.0)
    speaker.generation_config.eos_token_id = None
    pad = 0 if 't5' in speaker.config.model_type else PAD
    model = Model(config, Generation(eos=(), pad=pad, start=0, bos=3))
    case = Case(
        oracle, model, from_torch(oracle.state_dict(), model.family.keys(config), model.shapes()), prompts(model)
    )
    # Two tokens end a sequence: such that many do, but not at once.
    written = case.theirs(max_new_tokens=NEW)[:, case.prompt :]
    rows = np.array([(written[:, 1:] == token).any(axis=1).sum() for token in range(VOCAB)])
    eos = tuple(int(token) for token in np.argsort(-rows, kind='stable')[:2])
    speaker.generation_config.eos_token_id = list(eos)
    return case._replace(model=replace(model, generation=replace(model.generation, eos=eos)))


def log_probs(case, tokens):
    """Log-probability, by torch, of every generated token up to the end of its row; 0 behind it."""
    batch = dict(case.batch)
    if case.model.encoder_decoder:
        batch['decoder_input_ids'] = tokens
    else:
        more = tokens.shape[1] - case.prompt
        batch['input_ids'] = tokens
        batch['attention_mask'] = np.pad(batch['attention_mask'], ((0, 0), (0, more)), constant_values=1)
        if 'token_type_ids' in batch:
            batch['token_type_ids'] = np.pad(batch['token_type_ids'], ((0, 0), (0, more)), constant_values=1)
        if not hasattr(case.model.cfg, 'qformer') or True:
            batch['position_ids'] = np.maximum(np.cumsum(batch['attention_mask'], axis=1) - 1, 0)
    with torch.no_grad():
        logits = case.oracle(**{name: torch.asarray(array) for name, array in batch.items()}).logits
        logits = torch.log_softmax(logits[:, case.prompt - 1 : -1], dim=-1).numpy()
    new = tokens[:, case.prompt :]
    picked = np.take_along_axis(logits, new[..., None], axis=2)[..., 0]
    ended = np.isin(new, case.model.generation.eos)
    return np.where(np.cumsum(ended, axis=1) - ended == 0, picked, 0.0)


def explained(case, ours, theirs, **options):
    """Whether the rows that differ are near ties of their scores; few are."""
    differ = (ours != theirs).any(axis=1)
    assert differ.mean() < 0.02, (differ.sum(), options)
    return differ.sum()


GREEDY = [{}, {'min_length': WORDS + 6}]
BEAMS = [
    {'num_beams': 5, 'length_penalty': penalty, 'early_stopping': early}
    for penalty in (-1.0, 0.0, 1.0)
    for early in (True, False, 'never')
]
BEAMS += [{'num_beams': 5, 'length_penalty': -1.0, 'min_length': WORDS + 6}]


@pytest.mark.parametrize('name', FAMILIES)
def test_tokens_equal_transformers(name, cases):
    case = cases(name)
    for options in GREEDY + BEAMS:
        options = options | {'max_length': case.prompt + NEW}
        ours, theirs = case.ours(**options), case.theirs(**options)
        assert ours.shape == theirs.shape, options
        new = theirs[:, case.prompt :]
        ended = np.isin(new[:, :-1], case.model.generation.eos).any(1).mean()
        print(name, options, theirs.shape, (ours != theirs).any(axis=1).sum(), ended, case.model.generation.eos)
