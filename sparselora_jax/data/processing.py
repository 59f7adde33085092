"""Converts images and texts by the processor of a Hugging Face directory, and lays them out in batches.

transformers' processors and their PIL image processors do the conversion, without torch. This module decides the
order of tokens:

  BLIP-2, InstructBLIP   [image][pads][prompt][answer]           the processor pads the text alone
  LLaVA, PaliGemma       [pads][prompt, image in it][answer]
  with T5                [image][prompt][pads], [start][answer]  relative positions, so no pads between image and prompt
  BLIP-2's retrieval     [text][pads]                            image and text are compared, and no answer follows

`image` stands for `Processor.image_tokens` placeholders; `prompt_tokens` and `answer_tokens` count text alone. The
`ProcessorSpec` of a family selects one of the layouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Integer, Shaped
from PIL import Image

from sparselora_jax.data import model_config, processor_files
from sparselora_jax.data.images import is_deep, to_rgb
from sparselora_jax.data.model_config import CONFIG
from sparselora_jax.data.processor_spec import ImagePlace, ProcessorSpec
from sparselora_jax.runtime.errors import DataError

if TYPE_CHECKING:
    import transformers

# Stands in for the image of a text that has none.
_BLANK = np.zeros((9, 9, 3), np.uint8)
_QFORMER_PROMPT = 'prompt (as the Q-Former reads it)'
# Without a data format, transformers may read an array with few rows as channels-first. Without the conversion,
# PaliGemma's settings leave grey images grey.
_FOR_IMAGES = {'do_convert_rgb': True, 'input_data_format': 'channels_last'}
INPUTS = ('pixel_values', 'input_ids', 'attention_mask', 'qformer_input_ids', 'qformer_attention_mask')

# [height, width] or [height, width, 1, 3 or 4]; anonymous axes, since images of one batch differ in size.
# The arrays are uint8, which `_as_8_bits` checks, since floats of 0 to 1 would silently become black.
Picture = Image.Image | Shaped[np.ndarray, '_ _'] | Shaped[np.ndarray, '_ _ _']
# Arrays by the names that transformers' processors give them.
Inputs = dict[str, Int32[np.ndarray, '...'] | Float32[np.ndarray, '...'] | Bool[np.ndarray, '...']]


@dataclass(frozen=True)
class Processor:
    """The processor of a model directory.

    Attributes:
      spec: how its model family lays out texts and images.
      hf: the transformers processor.
      image_tokens: number of placeholder tokens for one image.
      end: the end token: generation stops at it, and training answers end with it.
      start: the decoder's first token; None unless the language model is an encoder-decoder.
      vocab: number of tokens that the language model knows (or the Q-Former, where there is no language model). A
        tokenizer may have more, which the model cannot read.
      qformer_vocab: number of tokens that the Q-Former knows; None: it reads no text.
    """

    spec: ProcessorSpec
    hf: 'transformers.ProcessorMixin'
    image_tokens: int
    end: int
    start: int | None
    vocab: int
    qformer_vocab: int | None = None

    def prompt(self, images: Sequence[Picture], texts: Sequence[str]) -> Inputs:
        """Return a batch to generate from, with one image per text, padded to the longest text.

        A LLaVA text holds '<image>' once, e.g. 'USER: <image> What is this? ASSISTANT:'; other texts need not.
        Transparent pixels become white, as in transformers.

        Args:
          images: pictures of any size.
          texts: one prompt per image.

        Returns:
          `pixel_values` float32 [batch, 3, height, width]; `input_ids`, `attention_mask` and, where the family has
          them, `token_type_ids`, `qformer_input_ids`, `qformer_attention_mask`: int32 [batch, tokens].

        Raises:
          DataError: the numbers of images and texts differ, a text has the wrong number of '<image>', or an image is
            unreadable.
        """
        if not texts or len(images) != len(texts):
            raise DataError(f'{len(images)} images for {len(texts)} texts: one image a text is needed')
        if self.spec.image_place is ImagePlace.APART:
            return self.read_images(images) | self.read_texts(texts)
        texts = [self._with_image(text) for text in texts]
        # Image processors expect a channel axis, also of grey images.
        arrays = [_as_8_bits(image) for image in images]
        try:
            outputs = self.hf(images=arrays, text=texts, padding=True, return_tensors='np', images_kwargs=_FOR_IMAGES)
        except (ValueError, TypeError, OSError) as error:
            raise DataError(f'an image or a text that cannot be processed: {error}') from error
        names = (*INPUTS, 'token_type_ids') if self.spec.has_token_types else INPUTS
        dtypes = {'pixel_values': np.float32}
        return {name: outputs[name].astype(dtypes.get(name, np.int32), copy=False) for name in names if name in outputs}

    def read_images(self, images: Sequence[Picture]) -> Inputs:
        """Return a batch of images without texts.

        Args:
          images: pictures of any size.

        Returns:
          `pixel_values` float32 [batch, 3, height, width].

        Raises:
          DataError: an image is unreadable.
        """
        arrays = [_as_8_bits(image) for image in images]
        try:
            outputs = self.hf.image_processor(arrays, return_tensors='np', **_FOR_IMAGES)
        except (ValueError, TypeError, OSError) as error:
            raise DataError(f'an image that cannot be processed: {error}') from error
        return {'pixel_values': outputs['pixel_values'].astype(np.float32, copy=False)}

    def read_texts(self, texts: Sequence[str], length: int | None = None) -> Inputs:
        """Return a batch of texts without images; pads come last.

        Args:
          texts: the texts, which need no image token.
          length: number of tokens that each text is padded or cut to, special tokens included; None: the longest.

        Returns:
          `input_ids` and `attention_mask`, int32 [batch, length].

        Raises:
          DataError: a token is not in the model's vocabulary.
        """
        padding = 'longest' if length is None else 'max_length'
        is_cut = length is not None
        outputs = self.hf.tokenizer(
            list(texts), padding=padding, truncation=is_cut, max_length=length, return_tensors='np'
        )
        tokens = outputs['input_ids'].astype(np.int32)
        # All rows have the length that was asked for, so only an unknown token is a misfit.
        if reason := _first_misfit([_Words('text', row, row.size, self.vocab) for row in tokens]):
            raise DataError(reason)
        return {'input_ids': tokens, 'attention_mask': outputs['attention_mask'].astype(np.int32)}

    def example(
        self, image: Picture | None, prompt: str, answer: str = '', *, prompt_tokens: int, answer_tokens: int
    ) -> Inputs:
        """Return one example with fixed shapes: to train on, or to generate from if the answer is ''.

        Args:
          image: a picture of any size; None for a text without an image. Then the positions of the image count as
            pads, so that the language model reads the text alone; `pixel_values` are zeros.
          prompt: the text before the answer, as in `prompt`.
          answer: the text to learn; '' for an example to generate from.
          prompt_tokens: number of tokens that each prompt is padded to.
          answer_tokens: number of tokens that each answer is padded to, its end token included.

        Returns:
          `pixel_values` [3, height, width];
          `input_ids`, `attention_mask`, PaliGemma's `token_type_ids` (1 on the answer), int32
          [image_tokens + prompt_tokens + answer_tokens - 1]: the prompt, then the answer without its last token.
          Generation and an encoder use only the first image_tokens + prompt_tokens;
          `decoder_input_ids` int32 [answer_tokens]: for an encoder-decoder, the answer shifted by one;
          `targets` int32, `answer` bool [answer_tokens]: the tokens that the last `answer_tokens` positions predict,
          and which of these count in the loss;
          `qformer_input_ids`, `qformer_attention_mask` int32 [prompt_tokens].

        Raises:
          DataError: a prompt or an answer does not fit, a prompt has no tokens, or as for `prompt`.
        """
        # The processor pads to the longest text of a batch. A single text gets no pads, so they are added here.
        inputs = self.prompt([_BLANK if image is None else image], [prompt])
        row = {name: value[0] for name, value in inputs.items()}
        if image is None:
            row['pixel_values'] = np.zeros_like(row['pixel_values'])
            row['attention_mask'] = row['attention_mask'] * (row['input_ids'] != self._image_id)
        target = [*self._answer_tokens(prompt, answer), self.end] if answer.strip() else []
        words = self._without_image(row['input_ids'].tolist())
        texts = [
            _Words('prompt', words, prompt_tokens, self.vocab),
            _Words('answer', target, answer_tokens, self.vocab),
        ]
        if 'qformer_input_ids' in row:
            texts.append(_Words(_QFORMER_PROMPT, row['qformer_input_ids'].tolist(), prompt_tokens, self.qformer_vocab))
        if reason := _first_misfit(texts):
            raise DataError(f'{reason}: {prompt!r} -> {answer!r}')
        if not words:
            raise DataError('the prompt is empty: there is no token to predict the answer from')

        example = {'pixel_values': row.pop('pixel_values')}
        pad = self.hf.tokenizer.pad_token_id
        # A position predicts the token after it, so the answer's last token is a target and never an input.
        inputs = _pad_right(target[:-1], answer_tokens - 1, pad)
        read = _pad_right([1] * len(target[:-1]), answer_tokens - 1, 0)
        for name, tokens in row.items():
            fill = {'input_ids': pad, 'qformer_input_ids': self._qformer_pad}.get(name, 0)
            if name.startswith('qformer'):
                example[name] = _pad_right(tokens, prompt_tokens, fill)
            elif self.start is not None:  # an encoder reads the prompt alone, and its pads come last
                example[name] = _pad_right(tokens, self.image_tokens + prompt_tokens, fill)
            else:
                pads = np.full(prompt_tokens - len(words), fill, np.int32)
                before_pads = 0 if self.spec.pads_whole_prompt else self.image_tokens
                tail = inputs if name == 'input_ids' else read
                example[name] = np.concatenate([tokens[:before_pads], pads, tokens[before_pads:], tail])
        if self.start is not None:
            example['decoder_input_ids'] = np.concatenate([np.int32([self.start]), inputs])
        example['targets'] = _pad_right(target, answer_tokens, pad)
        example['answer'] = np.arange(answer_tokens) < len(target)
        return example

    def misfit(self, prompt: str, answer: str, *, prompt_tokens: int, answer_tokens: int | None = None) -> str:
        """Return why `example` would refuse these texts, or '' if it would accept them; needs no image.

        Args:
          prompt: the text before the answer.
          answer: the text to learn.
          prompt_tokens: number of tokens that each prompt is padded to.
          answer_tokens: number of tokens that each answer is padded to; None: answers need not fit.
        """
        try:
            texts = self._words_of_prompt(prompt, prompt_tokens)
        except DataError as error:
            return str(error)
        # An answer that is only compared as text may have any length, and is not read by the model.
        if answer_tokens is not None:
            target = [*self._answer_tokens(prompt, answer), self.end]
            texts.append(_Words('answer', target, answer_tokens, self.vocab))
        return _first_misfit(texts)

    def prompt_length(self, prompt: str) -> int:
        """Return the number of tokens of a prompt without image tokens: the least `prompt_tokens` that `example` takes.

        Args:
          prompt: the text before the answer.

        Raises:
          DataError: the prompt has the wrong number of '<image>'.
        """
        return max(len(words.tokens) for words in self._words_of_prompt(prompt, 0))

    def _words_of_prompt(self, prompt: str, prompt_tokens: int) -> list['_Words']:
        """Return the tokens of a prompt as the language model reads it and, where there is one, the Q-Former."""
        text = self._with_image(prompt)
        tokenizer = self.hf.tokenizer
        if self.spec.prompt_template:
            # The processor writes the template itself, special tokens included.
            text = text.removeprefix(str(self.hf.image_token))
            text = self.spec.prompt_template.format(bos=tokenizer.bos_token, text=text)
            tokens = tokenizer(text, add_special_tokens=False)['input_ids']
        else:
            tokens = tokenizer(text)['input_ids']
        words = [_Words('prompt', self._without_image(tokens), prompt_tokens, self.vocab)]
        if self.spec.has_instruction:
            instruction = self.hf.qformer_tokenizer(text)['input_ids']
            words.append(_Words(_QFORMER_PROMPT, instruction, prompt_tokens, self.qformer_vocab))
        return words

    def decode(self, ids: Integer[np.ndarray, 'batch tokens'] | Sequence[Sequence[int]]) -> list[str]:
        """Return generated tokens as texts, without special tokens and surrounding spaces.

        Args:
          ids: rows of tokens.
        """
        return [text.strip() for text in self.hf.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @property
    def _qformer_pad(self) -> int | None:
        return self.hf.qformer_tokenizer.pad_token_id if self.spec.has_instruction else None

    @property
    def has_unknown_tokens(self) -> bool:
        """Return whether the tokenizer can give tokens that the model does not know."""
        return len(self.hf.tokenizer) > self.vocab

    def _without_image(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens that are words; image tokens stand for an image, and may lie outside the vocabulary."""
        image = self._image_id
        return [token for token in tokens if token != image]

    @property
    def _image_id(self) -> int:
        return self.hf.tokenizer.convert_tokens_to_ids(str(self.hf.image_token))

    def _with_image(self, text: str) -> str:
        """Return the text as the transformers processor expects it, with the image token in its place."""
        token = str(self.hf.image_token)
        count = text.count(token)
        place = self.spec.image_place
        if place is ImagePlace.IN_TEXT and count != 1:
            raise DataError(
                f'a prompt of this model holds {token} once, as {self.spec.text.prompt!r} does; got {text!r}'
            )
        allowed = 1 if self.spec.pads_whole_prompt else 0
        if count > allowed:
            raise DataError(f'{token} stands for the image and is added automatically; remove it from {text!r}')
        if place is ImagePlace.BEFORE_TEXT and not count:
            return token + text
        return text

    def _answer_tokens(self, prompt: str, answer: str) -> list[int]:
        """Return the tokens of an answer after this prompt, without the end token."""
        tokenizer = self.hf.tokenizer
        answer = answer.strip()
        tokens = tokenizer(answer, add_special_tokens=False)['input_ids']
        # In an encoder-decoder, or after a template, the answer is tokenized as a separate text.
        if self.start is None and not self.spec.prompt_template:
            # Tokenizers treat a leading space differently, so the answer is tokenized together with its prompt.
            space = '' if prompt[-1:].isspace() else ' '
            head = tokenizer(prompt)['input_ids']
            whole = tokenizer(prompt + space + answer)['input_ids']
            if whole[: len(head)] == head:  # otherwise one token spans the boundary of prompt and answer
                tokens = whole[len(head) :]
        return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens


class _Words(NamedTuple):
    """The tokens of a text that must fit: at most `limit` of them, each below `vocab`."""

    name: str
    tokens: Sequence[int]
    limit: int
    vocab: int


def _first_misfit(texts: Sequence[_Words]) -> str:
    """Return an error text for the first text that is too long or has an unknown token, or '' if all fit."""
    for name, tokens, limit, vocab in texts:
        if len(tokens) > limit:
            return f'{name} of {len(tokens)} tokens, at most {limit} fit'
        # The model would read another word instead, or compute NaN.
        if len(tokens) and max(tokens) >= vocab:
            return (
                f"{name} has token {max(tokens)}, and the model knows 0 to {vocab - 1}; use the model's own tokenizer"
            )
    return ''


def _as_8_bits(image: Picture) -> Picture:
    """Return an image with a channel axis; a PIL image of more than 8 bits is scaled as when it is read from a file."""
    if isinstance(image, Image.Image):
        return Image.fromarray(to_rgb(image)) if is_deep(image) else image
    if image.dtype != np.uint8:
        raise DataError(f'an image is an array of {image.dtype}, expected uint8: levels from 0 to 255')
    return image[..., None] if image.ndim == 2 else image


def _pad_right(row: Sequence[int] | np.ndarray, length: int, fill: int) -> Integer[np.ndarray, ' length']:
    return np.asarray([*row] + [fill] * (length - len(row)), np.int32)


def load_processor(folder: str | Path, spec: ProcessorSpec | None = None) -> Processor:
    """Read the processor of a directory, and test it on an image.

    No code from the directory is run. Settings that are missing in an old directory are taken from config.json. Texts
    are padded on the left, except for a T5 encoder and a Q-Former, which pad on the right.

    Args:
      folder: a Hugging Face directory.
      spec: description of its processor; None: the one registered for the directory's `model_type`.

    Returns:
      The processor.

    Raises:
      UnsupportedModelError: no family registered this `model_type`.
      StorageError: config.json or a file of settings is damaged, or has an impossible value.
      DataError: a file is missing or unreadable, or the processor's output does not match config.json in image
        size, image token or number of image tokens.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise DataError(f'{folder}: no {CONFIG}; a model directory as transformers saves it is needed')
    config = model_config.parse(folder)
    if spec is None:
        spec = processor_files.find_spec(folder, config.model_type, config.architectures)
    hf = processor_files.read_processor(folder, config, spec)
    end = processor_files.find_end_token(folder, config, spec)
    if end is None:
        end = hf.tokenizer.eos_token_id
    # A directory may mix files of several models. Its processor then runs, but does not fit the model.
    qformer = getattr(config, 'qformer_config', None)
    is_apart = spec.image_place is ImagePlace.APART
    processor = Processor(
        spec,
        hf,
        spec.count_image_tokens(config),
        end,
        _start_token(config.text_config),
        # Without a language model, the Q-Former reads the text.
        vocab=qformer.vocab_size if is_apart else config.text_config.vocab_size,
        qformer_vocab=None if qformer is None else qformer.vocab_size,
    )
    _check_on_an_image(folder, processor, config.vision_config.image_size)
    return processor


def _start_token(text_config: 'transformers.PretrainedConfig') -> int | None:
    """Return the first token of an encoder-decoder's answers; None: the model is no encoder-decoder."""
    if not text_config.is_encoder_decoder:
        return None
    start = getattr(text_config, 'decoder_start_token_id', None)
    return text_config.pad_token_id if start is None else start  # T5's default start token is the pad


def _check_on_an_image(folder: Path, processor: Processor, image_size: int) -> None:
    """Check on a black image that the processor's output has the shapes that the model expects."""
    token = str(processor.hf.image_token)
    text = f'{token}a' if processor.spec.pads_whole_prompt else 'a'
    try:
        outputs = processor.prompt([np.zeros((9, 9, 3), np.uint8)], [text])
    except DataError as error:
        raise DataError(f'{folder}: its processor fails on a black image: {error}') from error
    height, width = outputs['pixel_values'].shape[2:]
    count = int((outputs['input_ids'] == processor.hf.tokenizer.convert_tokens_to_ids(token)).sum())
    if (height, width) != (image_size, image_size) or count != processor.image_tokens:
        raise DataError(
            f'{folder}: the processor makes {count} image tokens of {height}x{width} pixels, the model reads '
            f'{processor.image_tokens} of {image_size}x{image_size}: its files belong to different models'
        )
