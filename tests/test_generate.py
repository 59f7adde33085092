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
            made[name] = build(name, perturbed, from_torch)
        return made[name]

    return case


def build(name, perturbed, from_torch):
    kind, config = FAMILIES[name]
    torch.manual_seed(0)
    oracle = perturbed(kind(config()))
    cfg = from_hf(oracle.config)
    speaker = oracle.language_model if hasattr(cfg, 'qformer') else oracle
    with torch.no_grad():  # sharper: otherwise many of the best tokens are near ties
        speaker.get_output_embeddings().weight.mul_(2.0)
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


def log_probs(case, tokens):
    """Log-probability of every generated token up to the end of its row, 0 behind it; and the lengths till there."""
    batch, more = dict(case.batch), ((0, 0), (0, tokens.shape[1] - case.prompt))
    if case.model.encoder_decoder:
        batch['decoder_input_ids'] = tokens
    else:
        batch['input_ids'] = tokens
        batch |= {
            k: np.pad(v, more, constant_values=1) for k, v in batch.items() if k in ('attention_mask', 'token_type_ids')
        }
    logits = case.model.logits(case.params, batch)[:, case.prompt - 1 : -1]
    new = tokens[:, case.prompt :]
    picked = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), new[..., None], axis=2)[..., 0]
    ended = np.isin(new, case.model.generation.eos)
    real = np.cumsum(ended, axis=1) - ended == 0
    return np.where(real, picked, 0.0), real.sum(axis=1)


def assert_equal_but_for_ties(case, ours, theirs, options):
    """Rows may differ, but for less than 2%, where two scores are within 1e-4: the first other word's, or the beams'."""
    assert ours.shape == theirs.shape, options
    rows = (ours != theirs).any(axis=1)
    assert rows.mean() < 0.02, (options, rows.sum())
    if not rows.any():
        return
    (a, a_length), (b, b_length) = log_probs(case, ours), log_probs(case, theirs)
    if options.get('num_beams', 1) == 1:
        first = np.argmax(ours != theirs, axis=1)[:, None] - case.prompt
        gap = np.take_along_axis(a - b, first, axis=1)[:, 0]
    else:
        penalty = options['length_penalty']
        gap = a.sum(axis=1) / a_length**penalty - b.sum(axis=1) / b_length**penalty
    assert np.abs(gap[rows]).max() < 1e-4, options


def settings(prompt):
    """Arguments of `generate` for so long a prompt."""
    lengths = {'max_length': prompt + NEW}
    ways = [{}] + [
        {'num_beams': 5, 'length_penalty': penalty, 'early_stopping': early}
        for penalty in (-1.0, 0.0, 1.0)
        for early in (True, False, 'never')
    ]
    late = [{}, {'num_beams': 5, 'length_penalty': -1.0, 'early_stopping': True}]
    return [way | lengths for way in ways] + [way | lengths | {'min_length': prompt + 5} for way in late]


@pytest.mark.parametrize('name', FAMILIES)
def test_tokens_equal_transformers(name, cases):
    case = cases(name)
    outputs = []
    for options in settings(case.prompt):
        ours, theirs = case.ours(**options), case.theirs(**options)
        assert_equal_but_for_ties(case, ours, theirs, options)
        ended = np.isin(theirs[:, case.prompt : -1], case.model.generation.eos).any(axis=1)
        assert 0.02 < ended.mean() <= 1.0, options
        outputs.append(np.pad(theirs, ((0, 0), (0, case.prompt + NEW - theirs.shape[1]))))
    different = {output.tobytes() for output in outputs}
    assert len(different) >= 7  # the settings matter


def test_scores_are_those_of_transformers(cases):
    """What `assert_equal_but_for_ties` goes by."""
    case = cases('llama')
    options = {'num_beams': 5, 'length_penalty': 1.0, 'max_new_tokens': NEW}
    with torch.no_grad():
        given = {name: torch.asarray(array) for name, array in case.batch.items()}
        want = case.oracle.generate(**given, **options, return_dict_in_generate=True, output_scores=True)
    scores, lengths = log_probs(case, want.sequences.numpy())
    np.testing.assert_allclose(scores.sum(axis=1) / lengths, want.sequences_scores, atol=1e-4)


def test_an_end_alone_or_none(cases):
    """One end token, and none: then all rows have the full length, whatever is written."""
    case = cases('llama')
    for eos in (case.model.generation.eos[:1], ()):
        model = replace(case.model, generation=replace(case.model.generation, eos=eos))
        options = {'num_beams': 3, 'max_new_tokens': 5}
        case.oracle.generation_config.eos_token_id = list(eos) or None
        want = case.theirs(**options)
        case.oracle.generation_config.eos_token_id = list(case.model.generation.eos)
        np.testing.assert_array_equal(case._replace(model=model).ours(**options), want)


def test_defaults_and_options(cases):
    """Arguments go before the model's options, those before transformers' defaults: 20 new tokens, one beam."""
    case = cases('opt')
    own = {'num_beams': 3, 'length_penalty': -2.0, 'max_length': 14, 'early_stopping': True, 'min_length': 8}
    model = replace(case.model, generation=replace(case.model.generation, options=tuple(own.items())))
    config = case.oracle.generation_config
    np.testing.assert_array_equal(case.ours(), case.theirs())
    assert case.ours().shape[1] == WORDS + 20
    for name, value in own.items():
        setattr(config, name, value)
    tuned = case._replace(model=model)
    for options in ({}, {'num_beams': 1, 'max_new_tokens': 4}):
        np.testing.assert_array_equal(tuned.ours(**options), case.theirs(**options))
    for name in own:
        setattr(config, name, None)


def test_pads_are_told_without_a_mask(cases):
    """A language model alone tells pads by their id; pads may come last, strange as that is."""
    case = cases('llama')
    ids = case.batch['input_ids'].copy()
    ids[::3, -1], ids[:, 0] = PAD, 9
    options = {'num_beams': 2, 'max_new_tokens': 5}
    np.testing.assert_array_equal(case.ours({'input_ids': ids}, **options), case.theirs({'input_ids': ids}, **options))


@pytest.mark.parametrize('name', ['blip-2 opt', 'blip-2 t5'])
def test_an_image_alone(name, cases):
    """Without a prompt it is the image's tokens and BOS."""
    case = cases(name)
    batch = {'pixel_values': case.batch['pixel_values'][:20]}
    got = case.ours(batch, num_beams=2, max_new_tokens=4)
    np.testing.assert_array_equal(got, case.theirs(batch, num_beams=2, max_new_tokens=4))


@pytest.mark.parametrize('first, options', [(0, {}), (9, {'num_beams': 4})])
def test_decoder_input_ids_begin_the_output(first, options, cases):
    """With the start token before them, which is added where all rows lack it."""
    case = cases('instructblip t5')
    begin = np.random.default_rng(1).integers(4, 50, (ROWS, 3))
    begin[:, 0] = first
    batch = case.batch | {'decoder_input_ids': begin}
    got, want = case.ours(batch, max_length=9, **options), case.theirs(batch, max_length=9, **options)
    np.testing.assert_array_equal(got, want)


def test_bound_weights(cases):
    """A masked and adapted model writes what the merged one writes."""
    case = cases('llama')
    masks = {
        'language': {
            'blocks': {'mlp': {'up': {'kernel': case.params['language']['blocks']['mlp']['up']['kernel'] > 0}}}
        }
    }
    lora = sl.init_lora(jax.random.key(0), case.params, [('.*head.*', None), ('.*', sl.LoraSpec(2, 4))])
    lora = jax.tree.map(lambda leaf: leaf + 0.1, lora)
    got = generate(case.model, sl.bind(case.params, masks, lora), case.batch, num_beams=2, max_new_tokens=5)
    want = generate(case.model, sl.merge(case.params, masks, lora), case.batch, num_beams=2, max_new_tokens=5)
    np.testing.assert_array_equal(got, want)
    assert (got != case.ours(num_beams=2, max_new_tokens=5)).any()


@pytest.mark.parametrize(
    'options, message',
    [
        ({'max_length': WORDS}, 'prompt has 6 tokens and max_length .* leaves room for 0'),
        ({'max_new_tokens': 0}, 'leaves room for 0'),
        ({'num_beams': 0}, 'num_beams 0: expected 1 or more'),
        ({'early_stopping': 'often'}, "early_stopping 'often': expected True, False or 'never'"),
    ],
)
def test_refused_arguments(options, message, cases):
    with pytest.raises(GenerationError, match=message):
        cases('llama').ours(**options)


def test_refused_options_and_batches(cases):
    case = cases('llama')
    strange = replace(case.model.generation, options=(('repetition_penalty', 1.5),))
    with pytest.raises(GenerationError, match='repetition_penalty = 1.5 is not supported'):
        case._replace(model=replace(case.model, generation=strange)).ours()
    with pytest.raises(GenerationError, match='no input_ids'):
        generate(case.model, case.params, {'attention_mask': case.batch['attention_mask']})


BYTES = {'pred': 1, 's32': 4, 'u32': 4, 'f32': 4}
NAMES = {'parameter', 'get-tuple-element', 'tuple', 'bitcast'}  # for values that are there


def large_results(text, least):
    """(opcode, type) of whatever a compiled loop that writes slices makes of `least` bytes or more, in its body or below.

    A write into a slice of what the loop carries is in place: it is counted, not listed. -> (list, count)
    """
    found = re.findall(r'^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}', text, re.S | re.M)
    bodies = {name: body.splitlines() for name, body in found}
    todo = [name for name in re.findall(r'body=%?([\w.-]+)', text) if 'dynamic-update-slice' in str(bodies[name])]
    results, writes, seen = [], 0, set()
    while todo:
        if (name := todo.pop()) in seen:
            continue
        seen.add(name)
        for line in bodies[name]:
            below = re.findall(r'(?:calls|to_apply|body|condition)=%?([\w.-]+)', line)
            todo += below
            match = re.match(r'\s*(ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(%?(\w*)', line)
            if match is None or match[3] in NAMES:
                continue
            shapes = [(BYTES[dtype], shape) for dtype, shape in re.findall(r'(\w+)\[([\d,]*)\]', match[2])]
            if all(size * np.prod([int(n) for n in shape.split(',') if n]) < least for size, shape in shapes):
                continue
            roots = [root for inner in below for root in bodies[inner] if 'ROOT' in root]
            if match[3] == 'dynamic-update-slice' and match[4].startswith('param'):
                writes += 1
            elif not any('dynamic-update-slice(%param' in root for root in roots):
                results.append(match.group(3, 2))
    return results, writes


def llama_step():
    return hf.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )


def t5_step():
    sizes = {'d_model': 128, 'd_kv': 32, 'd_ff': 128, 'num_layers': 2, 'num_heads': 4}
    text = hf.T5Config(vocab_size=64, **sizes, feed_forward_proj='gated-gelu')
    return hf.Blip2Config(**IMAGES, text_config=text.to_dict())


@pytest.mark.parametrize(
    'config, beams, bound', [(llama_step, 1, False), (llama_step, 5, True), (t5_step, 5, False)], ids=str
)
def test_a_step_copies_neither_caches_nor_weights(config, beams, bound):
    """Nothing it makes is as large as a layer's keys or its smallest kernel, 64 KiB; it writes four of them in place."""
    model = Model(from_hf(config()), Generation(eos=(2,), pad=1, start=0))
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), model.shapes(), is_leaf=lambda n: isinstance(n, tuple)
    )
    if bound:
        kernels = {'blocks': {'attn': {'q': params['language']['blocks']['attn']['q']}}}
        params = sl.bind(params, {'language': kernels})
    ids = np.zeros((2, 64), np.int32)
    batch = {'input_ids': ids, 'attention_mask': ids, 'pixel_values': np.zeros((2, 3, 8, 8), np.float32)}
    batch |= {'decoder_input_ids': ids, 'decoder_attention_mask': ids}
    rules = search.rules(NEW, length_penalty=1.0, early_stopping=False, min_new=0, eos=(2,), pad=1)
    text = decode.decode.lower(model, params, batch, rules, beams=beams).compile().as_text()
    assert large_results(text, 2**16) == ([], 4)


def test_a_copy_would_be_seen():
    """What `large_results` finds in loops that gather, transpose or copy."""

    def gathers(cache):
        return cache.at[0].set(1.0)[jnp.array([1, 0, 2, 3])]

    def grows(cache):
        return jnp.concatenate([cache[1:], cache[:1] * 2.0]).at[0].set(1.0)

    for change in (gathers, grows):
        loop = jax.jit(lambda cache, change=change: jax.lax.fori_loop(0, 9, lambda _, cache: change(cache), cache))
        results, _ = large_results(loop.lower(jnp.zeros((4, 64, 64))).compile().as_text(), 2**16)
        assert results
