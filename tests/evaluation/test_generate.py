"""Token for token what transformers' `generate` gives, over every family; arguments, defaults and what is refused."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from tiny_families import FAMILIES, NEW, PAD, ROWS, WORDS, build

import sparselora_jax as sl
from sparselora_jax.evaluation.generate import GenerationError, generate
from sparselora_jax.runtime.errors import BatchError


@pytest.fixture(scope='module')
def cases(perturbed, from_torch):
    """A family's `Case`, made when it is first asked for."""
    made = {}

    def case(name):
        if name not in made:
            made[name] = build(name, perturbed, from_torch)
        return made[name]

    return case


def log_probs(case, tokens):
    """Log-probability of every generated token up to the end of its row, 0 behind it; and the lengths till there."""
    batch, more = dict(case.batch), ((0, 0), (0, tokens.shape[1] - case.prompt))
    if case.model.is_encoder_decoder:
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
    """Less than 2% of the rows differ, and only where scores are within 1e-4: the first other word's, or the beams'."""
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


QUICK = ('llama',)


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAMILIES]
)
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


@pytest.mark.slow
@pytest.mark.parametrize('name', FAMILIES)
def test_repeated_tokens_and_other_ends_equal_transformers(name, cases):
    case = cases(name)
    end = case.model.generation.eos[0]
    plain = {}
    for beams in (1, 3):
        options = {'num_beams': beams, 'max_new_tokens': NEW}
        plain[beams] = case.ours(**options)
        options |= {'repetition_penalty': 1.5, 'eos_token_id': end}
        ours = case.ours(**options)
        theirs = case.theirs(**options)
        assert ours.shape == theirs.shape
        # Penalised scores are further apart than those of beams, so only exact ties could differ.
        assert (ours != theirs).any(axis=1).mean() < 0.02
        assert ours.shape != plain[beams].shape or (ours != plain[beams]).any(axis=1).mean() > 0.05


def test_scores_are_those_of_transformers(cases):
    """What `assert_equal_but_for_ties` goes by."""
    case = cases('llama')
    options = {'num_beams': 5, 'length_penalty': 1.0, 'max_new_tokens': NEW}
    with torch.no_grad():
        given = {name: torch.asarray(array) for name, array in case.batch.items()}
        want = case.oracle.generate(**given, **options, return_dict_in_generate=True, output_scores=True)
    scores, lengths = log_probs(case, want.sequences.numpy())
    np.testing.assert_allclose(scores.sum(axis=1) / lengths, want.sequences_scores, atol=1e-4)


@pytest.mark.slow
def test_no_end_one_end_and_many(cases):
    """Without one all rows have the full length; with many nearly every candidate ends."""
    case = cases('llama')
    for eos in ((), case.model.generation.eos[:1], tuple(range(4, 44))):
        model = replace(case.model, generation=replace(case.model.generation, eos=eos))
        options = {'num_beams': 3, 'max_new_tokens': 5}
        case.oracle.generation_config.eos_token_id = list(eos) or None
        want = case.theirs(**options)
        case.oracle.generation_config.eos_token_id = list(case.model.generation.eos)
        np.testing.assert_array_equal(case._replace(model=model).ours(**options), want)


@pytest.mark.slow
def test_defaults_and_options(cases):
    """Arguments go before the model's options, those before transformers' defaults: 20 new tokens, one beam."""
    case = cases('opt')
    own = {'num_beams': 5, 'length_penalty': -2.0, 'early_stopping': True, 'min_length': 8, 'max_length': WORDS + NEW}
    model = replace(case.model, generation=replace(case.model.generation, options=tuple(own.items())))
    config = case.oracle.generation_config
    np.testing.assert_array_equal(case.ours(), case.theirs())
    assert case.ours().shape[1] == WORDS + 20
    for name, value in own.items():
        setattr(config, name, value)
    tuned = case._replace(model=model)
    for options in ({}, {'num_beams': 1, 'max_new_tokens': NEW - 1}):
        np.testing.assert_array_equal(tuned.ours(**options), case.theirs(**options))
    for name in own:
        setattr(config, name, None)


@pytest.mark.slow
def test_pads_are_told_without_a_mask(cases):
    """A language model alone tells pads by their id; pads may come last, strange as that is."""
    case = cases('llama')
    ids = case.batch['input_ids'].copy()
    ids[::3, -1], ids[:, 0] = PAD, 9
    options = {'num_beams': 2, 'max_new_tokens': 5}
    np.testing.assert_array_equal(case.ours({'input_ids': ids}, **options), case.theirs({'input_ids': ids}, **options))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['blip-2 opt', 'blip-2 t5'])
def test_an_image_alone(name, cases):
    """Without a prompt it is the image's tokens and BOS."""
    case = cases(name)
    batch = {'pixel_values': case.batch['pixel_values'][:20]}
    got = case.ours(batch, num_beams=2, max_new_tokens=4)
    np.testing.assert_array_equal(got, case.theirs(batch, num_beams=2, max_new_tokens=4))


@pytest.mark.slow
@pytest.mark.parametrize(('first', 'options'), [(0, {}), (9, {'num_beams': 4})])
def test_decoder_input_ids_begin_the_output(first, options, cases):
    """With the start token before them, which is added where all rows lack it."""
    case = cases('instructblip t5')
    begin = np.random.default_rng(1).integers(4, 50, (ROWS, 3))
    begin[:, 0] = first
    batch = case.batch | {'decoder_input_ids': begin}
    got, want = case.ours(batch, max_length=9, **options), case.theirs(batch, max_length=9, **options)
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
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
    options = {'num_beams': 5, 'max_new_tokens': NEW}
    got = generate(case.model, sl.bind(case.params, masks, lora), case.batch, **options)
    want = generate(case.model, sl.merge(case.params, masks, lora), case.batch, **options)
    np.testing.assert_array_equal(got, want)
    assert (got != case.ours(**options)).any()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'max_length': WORDS}, 'prompt has 6 tokens and max_length .* leaves room for 0'),
        ({'max_new_tokens': 0}, 'leaves room for 0'),
        ({'num_beams': 0}, 'num_beams 0: expected 1 or more'),
        ({'early_stopping': 'often'}, "early_stopping 'often': expected True, False or 'never'"),
        ({'repetition_penalty': 0.0}, 'repetition_penalty 0.0: expected a finite number above 0'),
        ({'eos_token_id': [3, 60]}, r'eos_token_id \[3, 60\]: expected tokens of the vocabulary, 0 to 59'),
    ],
)
def test_refused_arguments(options, message, cases):
    with pytest.raises(GenerationError, match=message):
        cases('llama').ours(**options)


def test_refused_options_and_batches(cases):
    case = cases('llama')
    strange = replace(case.model.generation, options=(('no_repeat_ngram_size', 2),))
    with pytest.raises(GenerationError, match=r'no_repeat_ngram_size = 2 is not supported'):
        case._replace(model=replace(case.model, generation=strange)).ours()
    with pytest.raises(GenerationError, match='no input_ids'):
        generate(case.model, case.params, {'attention_mask': case.batch['attention_mask']})


@pytest.mark.slow
def test_refused_image_tokens_and_positions(cases):
    """Inside jit a missing image token would shift the image, a position beyond the table repeat its last row."""
    case = cases('llava')
    batch = case.batch | {'input_ids': case.batch['input_ids'].copy()}
    row, column = np.argwhere(batch['input_ids'] == case.model.cfg.image_token)[-1]
    batch['input_ids'][row, column] = 3
    with pytest.raises(BatchError, match=f'row {row} of input_ids has'):
        case.ours(batch)
    case = cases('opt')
    rows = case.model.cfg.language.max_positions
    with pytest.raises(GenerationError, match=f'6 tokens and {rows} more: .* at most {rows}'):
        case.ours(max_new_tokens=rows)
    case = cases('llama')  # a Mistral, but for its window
    windowed = replace(case.model.cfg.language, window=WORDS + 3)
    case = case._replace(model=replace(case.model, cfg=replace(case.model.cfg, language=windowed)))
    with pytest.raises(GenerationError, match=f'6 tokens and 4 more: .* at most {WORDS + 3}'):
        case.ours(max_new_tokens=4)
    assert case.ours(max_new_tokens=3).shape[1] <= WORDS + 3
