"""Greedy and beam search that give the same tokens as transformers 5.23's `generate`: arguments, defaults, prompts."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sparselora_jax.evaluation import decode, search
from sparselora_jax.models import layers, prompts
from sparselora_jax.models.model import Model
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.sparse import sharding


class GenerationError(SparseloraError, ValueError):
    """An argument, a batch or an entry of generation_config.json that generation does not accept."""


# Entries of generation_config.json that change which tokens transformers chooses, and that are not supported here. An
# entry is accepted at the values in this table, at which it changes nothing; None changes nothing either.
UNSUPPORTED = {
    # Forbid or force tokens:
    'bad_words_ids': ((),),
    'begin_suppress_tokens': ((),),
    'constraints': ((),),
    'force_words_ids': ((),),
    'forced_bos_token_id': (),
    'forced_eos_token_id': (),
    'no_repeat_ngram_size': (0,),
    'encoder_no_repeat_ngram_size': (0,),
    'suppress_tokens': ((),),
    'token_healing': (False,),
    # Change scores:
    'dola_layers': (),
    'encoder_repetition_penalty': (1.0,),
    'exponential_decay_length_penalty': (),
    'guidance_scale': (1.0,),
    'remove_invalid_values': (False,),
    'renormalize_logits': (False,),
    'sequence_bias': ((),),
    'watermarking_config': ((),),
    # Ask for another kind of search, or for several results:
    'diversity_penalty': (0.0,),
    'num_beam_groups': (1,),
    'num_return_sequences': (1,),
    'penalty_alpha': (0.0,),
    # Stop for other reasons than length and end tokens:
    'max_time': (),
    'stop_strings': ((), ''),
}


def check_options(model: Model) -> None:
    """Check that generation can follow the model's generation_config.json.

    Args:
      model: the model.

    Raises:
      GenerationError: an entry would change tokens, and is not supported; names it.
    """
    for name, value in model.generation.options:
        if value is not None and name in UNSUPPORTED and value not in UNSUPPORTED[name]:
            where = f'{model.source}/generation_config.json' if model.source else 'Model.generation.options'
            raise GenerationError(f'{where}: {name} = {value!r} is not supported; remove it')


def check_new_tokens(model: Model, prompt_length: int, new: int) -> None:
    """Check that a model can read a prompt with the longest answer.

    Args:
      model: the model.
      prompt_length: number of tokens of the prompt (of an encoder-decoder: of the decoder's prompt).
      new: maximum number of tokens after the prompt.

    Raises:
      GenerationError: together they are more than the model reads.
    """
    longest = model.cfg.language.longest
    if longest is not None and prompt_length + new > longest:
        raise GenerationError(
            f'{prompt_length} tokens and {new} more: {layers.reads_at_most(longest)}; lower max_new_tokens'
        )


def generate(
    model: Model,
    weights: dict,
    batch: dict,
    *,
    num_beams: int | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    min_length: int | None = None,
    min_new_tokens: int | None = None,
    length_penalty: float | None = None,
    early_stopping: bool | str | None = None,
    repetition_penalty: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> np.ndarray:
    """Return the most likely continuation of each prompt, by greedy search (one beam) or beam search.

    Nothing is sampled. An argument that is None takes the value of the model's generation_config.json, otherwise
    transformers' default: one beam, 20 new tokens, no minimum, length_penalty 1, early_stopping False, no
    repetition_penalty. The program is compiled once per shape of `batch`, number of beams and number of new tokens, and
    once more with a repetition penalty.

    Args:
      model: the model.
      weights: its params, or the result of `bind`. On a mesh the batch is split along data, where that divides it.
      batch: see `models.model`. Without `input_ids` the prompt is the image and the BOS token. The
        `decoder_input_ids` of an encoder-decoder are the first tokens of the output.
      num_beams: number of beams; 1 is greedy search.
      max_length: maximum number of tokens, including the prompt's (or those of `decoder_input_ids`).
      max_new_tokens: maximum number of tokens after the prompt; overrides `max_length`.
      min_length: minimum number of tokens, including the prompt's.
      min_new_tokens: minimum number of tokens after the prompt; overrides `min_length`.
      length_penalty: a beam's score is its summed log-probabilities / length ** length_penalty.
      early_stopping: True: stop when there are `num_beams` finished beams. False: stop when the best running beam
        scores less than all of them at its current length. 'never': the same, but at its best possible length.
      repetition_penalty: number above 0 that divides the scores of tokens which the prompt or the beam has already
        (CTRL, arXiv 1909.05858); above 1 it makes them less likely. The prompt of an encoder-decoder is the decoder's.
      eos_token_id: tokens that end a text; None: those of the model. A model whose answers end with the line needs the
        token of a newline.

    Returns:
      Token ids `[batch, tokens]`, as wide as the longest row: prompt and continuation (of an encoder-decoder: start
      token and continuation). Rows that end early are padded.

    Raises:
      GenerationError: a value is out of range; a prompt is as long as `max_length`, or too long for the model's table
        of positions or window of attention; an image has no `input_ids` and the model no BOS token; an entry of
        generation_config.json is not supported.
      BatchError: a token is outside the vocabulary; a row has more or fewer image tokens than its image has soft
        words; PaliGemma's batch has no token_type_ids.
    """
    if not isinstance(model, Model) or not isinstance(batch, Mapping):
        raise GenerationError(
            f'generate got a model of type {type(model).__name__} and a batch of type {type(batch).__name__}: expected '
            'model, params = sl.load_model(...); sl.generate(model, params, {"input_ids": tokens})'
        )
    batch = _add_prompt(model, batch)
    # Values are checked here, because `decode` is compiled and knows only shapes.
    prompts.check_ids(model.cfg, batch)
    if 'pixel_values' in batch:
        prompts.check_image_tokens(model.cfg, batch['input_ids'], batch['attention_mask'])
    arguments = {
        'num_beams': num_beams,
        'max_length': max_length,
        'max_new_tokens': max_new_tokens,
        'min_length': min_length,
        'min_new_tokens': min_new_tokens,
        'length_penalty': length_penalty,
        'early_stopping': early_stopping,
        'repetition_penalty': repetition_penalty,
        'eos_token_id': eos_token_id,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    prompt = np.asarray(batch['decoder_input_ids' if model.is_encoder_decoder else 'input_ids'])
    beams, settings = _settings(model, arguments, prompt.shape[1])
    tokens, length = decode.decode(model, weights, batch, settings, beams=beams, mesh=sharding.mesh_of(weights))
    # `decode` returns the maximum number of columns. transformers returns only as many as the longest row fills.
    return np.concatenate([prompt, np.asarray(tokens)[:, : int(length)]], axis=1)


def _settings(model: Model, arguments: dict, prompt_length: int) -> tuple[int, search.Settings]:
    """Return the number of beams and how to search.

    Args:
      model: the model, whose own options override transformers' defaults.
      arguments: arguments of `generate`, which override both.
      prompt_length: number of tokens of the prompt.
    """
    check_options(model)
    own_options = {name: value for name, value in model.generation.options if value is not None}
    defaults = {
        'num_beams': 1,
        'min_length': 0,
        'length_penalty': 1.0,
        'early_stopping': False,
        'repetition_penalty': 1.0,
    }
    options = defaults | own_options | arguments

    new = options.get('max_new_tokens')
    if new is None:
        # Without a length transformers generates 20 tokens, fewer where the table of positions ends.
        limit = getattr(model.cfg.language, 'max_positions', prompt_length + 20)
        new = options.get('max_length', min(prompt_length + 20, limit)) - prompt_length
    if new < 1:
        raise GenerationError(
            f'the prompt has {prompt_length} tokens and max_length (or max_new_tokens) leaves room for {new} more: '
            'raise max_length or max_new_tokens'
        )
    check_new_tokens(model, prompt_length, new)
    if options['num_beams'] < 1:
        raise GenerationError(f'num_beams {options["num_beams"]}: expected 1 or more')
    if options['early_stopping'] not in (True, False, 'never'):
        raise GenerationError(f"early_stopping {options['early_stopping']!r}: expected True, False or 'never'")

    if not 0 < options['repetition_penalty'] < math.inf:
        raise GenerationError(f'repetition_penalty {options["repetition_penalty"]}: expected a finite number above 0')

    eos = model.generation.eos
    # That of generation_config.json is in `model.generation` already.
    if 'eos_token_id' in arguments:
        eos = _end_tokens(arguments['eos_token_id'], model.cfg.language.vocab)
    pad = model.generation.pad
    if options['num_beams'] > 1:
        # transformers' beam search writes `pad_token_id or eos_token_id[0]`, so a pad of 0 counts as none.
        pad = (pad or eos[0]) if eos else -1
    # min_length counts the prompt; min_new_tokens does not, and takes precedence.
    min_new = max(options.get('min_new_tokens', options['min_length'] - prompt_length), 0)
    return options['num_beams'], search.make_settings(
        new,
        length_penalty=float(options['length_penalty']),
        early_stopping=options['early_stopping'],
        min_new=min_new,
        eos=eos,
        pad=pad,
        repetition_penalty=float(options['repetition_penalty']),
    )


def _end_tokens(given: int | Sequence[int], vocab: int) -> tuple[int, ...]:
    """Return the tokens of `eos_token_id`.

    Raises:
      GenerationError: they are no tokens of the vocabulary.
    """
    tokens = (given,) if isinstance(given, int | np.integer) else tuple(given)
    for token in tokens:
        if not isinstance(token, int | np.integer) or not 0 <= token < vocab:
            raise GenerationError(f'eos_token_id {given!r}: expected tokens of the vocabulary, 0 to {vocab - 1}')
    return tuple(int(token) for token in tokens)


def _add_prompt(model: Model, batch: dict) -> dict:
    """Return the batch with what transformers adds to it: a prompt, its mask and the decoder's first token."""
    batch = dict(batch)
    generation = model.generation
    if batch.get('input_ids') is None:
        images = batch.get('pixel_values')
        if images is None or generation.bos is None or not model.family.is_prompted_by_image:
            raise GenerationError('the batch has no input_ids, and this model has no prompt of its own: add input_ids')
        row = [model.cfg.image_token] * model.cfg.image_tokens + [generation.bos]
        batch['input_ids'] = np.tile(np.array(row, np.int32), (len(images), 1))
    tokens = np.asarray(batch['input_ids'])
    if batch.get('attention_mask') is None:
        # transformers' language models recognise pads by their id, unless that id also ends a sequence. A language
        # model that generates from embeddings (BLIP-2) sees no ids and treats all tokens as words.
        finds_pads = model.family.reads_generation_config and generation.pad not in generation.eos
        batch['attention_mask'] = (tokens != generation.pad) if finds_pads else np.ones_like(tokens)
    if model.is_encoder_decoder:
        batch |= _decoder_prompt(generation.start, len(tokens), batch)
    return batch


def _decoder_prompt(start: int | None, rows: int, batch: dict) -> dict:
    """Return the first tokens of a decoder: its start token, then the decoder tokens of the batch, if any.

    As in transformers, the start token is added only if no row begins with it.

    Args:
      start: the start token.
      rows: number of prompts.
      batch: may hold `decoder_input_ids` and `decoder_attention_mask`.
    """
    if start is None:
        raise GenerationError('an encoder-decoder without a decoder start token: set Model.generation.start')
    first = np.full((rows, 1), start, np.int32)
    if batch.get('decoder_input_ids') is None:
        return {'decoder_input_ids': first, 'decoder_attention_mask': np.ones_like(first)}
    tokens = np.asarray(batch['decoder_input_ids'])
    mask = batch.get('decoder_attention_mask')
    mask = np.ones_like(tokens) if mask is None else np.asarray(mask)
    if np.all(tokens[:, 0] != start):
        tokens = np.concatenate([first, tokens], axis=1)
        mask = np.concatenate([np.ones_like(first), mask], axis=1)
    return {'decoder_input_ids': tokens, 'decoder_attention_mask': mask}
