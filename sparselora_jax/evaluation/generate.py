"""Greedy and beam search, token for token as transformers 5.23's `generate`: arguments, defaults and prompts."""

import numpy as np

from sparselora_jax.evaluation import decode, search
from sparselora_jax.models import layers, prompts
from sparselora_jax.models.model import Model
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.sparse import sharding


class GenerationError(SparseloraError, ValueError):
    """Arguments, a batch or a generation_config.json that nothing can be generated from."""


# Entries of a generation_config.json that change what these searches choose, and the values that change nothing.
UNSUPPORTED = {
    'bad_words_ids': None,
    'begin_suppress_tokens': None,
    'diversity_penalty': 0.0,
    'encoder_no_repeat_ngram_size': 0,
    'encoder_repetition_penalty': 1.0,
    'exponential_decay_length_penalty': None,
    'forced_bos_token_id': None,
    'force_words_ids': None,
    'forced_eos_token_id': None,
    'guidance_scale': None,
    'max_time': None,
    'no_repeat_ngram_size': 0,
    'num_beam_groups': 1,
    'num_return_sequences': 1,
    'penalty_alpha': None,
    'renormalize_logits': False,
    'repetition_penalty': 1.0,
    'sequence_bias': None,
    'stop_strings': None,
    'suppress_tokens': None,
}


def generate(
    model: Model,
    weights: dict,
    batch: dict,
    *,
    num_beams: int | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    min_length: int | None = None,
    length_penalty: float | None = None,
    early_stopping: bool | str | None = None,
) -> np.ndarray:
    """The most likely continuation of each prompt, by greedy search (one beam) or beam search; never sampled.

    An argument that is None is what the model's generation_config.json says, or transformers' default: one beam,
    20 new tokens, no minimum, length_penalty 1, early_stopping False. Compiled once per shape of `batch` and numbers of
    beams and of new tokens.

    Args:
      weights: params, or what `bind` made of them; on a mesh, the batch is split along data where that divides it.
      batch: see `models.model`; without `input_ids` the prompt is the image and the BOS token. An encoder-decoder's
        `decoder_input_ids` are the beginning of what it generates.
      max_length: in tokens, those of the prompt (or of `decoder_input_ids`) included; so is `min_length`.
      max_new_tokens: without the prompt; goes before `max_length`.
      length_penalty: a beam's score is its summed log-probabilities / length ** length_penalty.
      early_stopping: True: stop when there are `num_beams` finished beams; False: when the best running one scores less
        than they do at its present length; 'never': at its best length.

    Returns:
      Token ids `[batch, tokens]`: prompt and continuation (an encoder-decoder: start token and continuation), those
      that end early filled up with pads; as long as the longest one.

    Raises:
      GenerationError: a value out of range; a prompt that is as long as `max_length`, or too long for the model's table
        of positions or window of attention; an image without `input_ids` for a model that has no BOS token; an entry of
        generation_config.json that is not supported.
      BatchError: a token outside the vocabulary; a row has other than one image token for each soft word of its image;
        PaliGemma's batch has no token_type_ids.
    """
    batch = _with_prompt(model, batch)
    prompts.check_ids(model.cfg, batch)
    if 'pixel_values' in batch:
        prompts.check_image_tokens(model.cfg, batch['input_ids'], batch['attention_mask'])
    given = {
        'num_beams': num_beams,
        'max_length': max_length,
        'max_new_tokens': max_new_tokens,
        'min_length': min_length,
        'length_penalty': length_penalty,
        'early_stopping': early_stopping,
    }
    prompt = np.asarray(batch['decoder_input_ids' if model.is_encoder_decoder else 'input_ids'])
    beams, rules = _rules(model, {k: v for k, v in given.items() if v is not None}, prompt.shape[1])
    tokens, length = decode.decode(model, weights, batch, rules, beams=beams, mesh=sharding.mesh_of(weights))
    return np.concatenate([prompt, np.asarray(tokens)[:, : int(length)]], axis=1)


def _rules(model: Model, given: dict, prompt: int) -> tuple[int, search.Rules]:
    """Beams and rules: arguments, then the model's own defaults, then transformers'. `prompt`: its length."""
    own = {name: value for name, value in model.generation.options if value is not None}
    for name in own.keys() & UNSUPPORTED.keys():
        if own[name] != UNSUPPORTED[name]:
            where = model.source or 'Model.generation.options'
            raise GenerationError(f'{where}: {name} = {own[name]!r} is not supported; remove it from the options')
    options = {'num_beams': 1, 'min_length': 0, 'length_penalty': 1.0, 'early_stopping': False} | own | given
    new = options.get('max_new_tokens')
    if new is None:
        limit = getattr(model.cfg.language, 'max_positions', prompt + 20)
        new = options.get('max_length', min(prompt + 20, limit)) - prompt
    if new < 1:
        raise GenerationError(
            f'the prompt has {prompt} tokens and max_length (or max_new_tokens) leaves room for {new} more: raise it'
        )
    longest = model.cfg.language.longest
    if longest is not None and prompt + new > longest:
        raise GenerationError(f'{prompt} tokens and {new} more: {layers.reads_at_most(longest)}; lower max_new_tokens')
    if options['num_beams'] < 1:
        raise GenerationError(f'num_beams {options["num_beams"]}: expected 1 or more')
    if options['early_stopping'] not in (True, False, 'never'):
        raise GenerationError(f"early_stopping {options['early_stopping']!r}: expected True, False or 'never'")
    pad, eos = model.generation.pad, model.generation.eos
    if options['num_beams'] > 1:  # transformers' beam search takes a pad of 0 for none
        pad = (pad or eos[0]) if eos else -1
    return options['num_beams'], search.rules(
        new,
        length_penalty=float(options['length_penalty']),
        early_stopping=options['early_stopping'],
        min_new=max(options.get('min_new_tokens', options['min_length'] - prompt), 0),
        eos=eos,
        pad=pad,
    )


def _with_prompt(model: Model, batch: dict) -> dict:
    """The batch with what transformers adds to it: a prompt, its mask, the decoder's first token."""
    batch, generation = dict(batch), model.generation
    images = batch.get('pixel_values')
    if batch.get('input_ids') is None:
        if images is None or generation.bos is None or not model.family.is_prompted_by_image:
            raise GenerationError('the batch has no input_ids, and this model has no prompt of its own: add them')
        row = [model.cfg.image_token] * model.cfg.image_tokens + [generation.bos]
        batch['input_ids'] = np.tile(np.array(row, np.int32), (len(images), 1))
    tokens = np.asarray(batch['input_ids'])
    if batch.get('attention_mask') is None:
        # A language model tells pads by their id, unless it is also that of an end. One that generates from embeddings
        # sees no ids and takes all for words.
        told = model.family.reads_generation_config and generation.pad not in generation.eos
        batch['attention_mask'] = (tokens != generation.pad) if told else np.ones_like(tokens)
    if model.is_encoder_decoder:
        batch |= _decoder_prompt(generation.start, len(tokens), batch)
    return batch


def _decoder_prompt(start: int | None, rows: int, batch: dict) -> dict:
    """What a decoder begins with: the start token, put before the given ones where they all lack it."""
    if start is None:
        raise GenerationError('an encoder-decoder without a decoder start token: set Model.generation.start')
    first = np.full((rows, 1), start, np.int32)
    if batch.get('decoder_input_ids') is None:
        return {'decoder_input_ids': first, 'decoder_attention_mask': np.ones_like(first)}
    tokens = np.asarray(batch['decoder_input_ids'])
    mask = batch.get('decoder_attention_mask')
    mask = np.ones_like(tokens) if mask is None else np.asarray(mask)
    if np.all(tokens[:, 0] != start):
        tokens, mask = (
            np.concatenate([ours, theirs], axis=1) for ours, theirs in ((first, tokens), (first * 0 + 1, mask))
        )
    return {'decoder_input_ids': tokens, 'decoder_attention_mask': mask}
