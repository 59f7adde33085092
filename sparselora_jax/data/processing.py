"""Images and texts for a Hugging Face directory: what its own processor makes of them, laid out for our batches.

transformers' processors and their PIL image processors do the work, without torch. Ours is where tokens stand:

  BLIP-2, InstructBLIP   [image][pads][prompt][answer]          the processor pads the text alone
  LLaVA, PaliGemma       [pads][prompt, image in it][answer]
  with T5                [image][prompt][pads], [start][answer]  relative positions: nothing may part image and prompt

`image` is `Processor.image_tokens` placeholders; `prompt_tokens` and `answer_tokens` count text alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from sparselora_jax.data import directory
from sparselora_jax.runtime.errors import DataError

IN_TEXT = ('llava', 'paligemma')  # the image's placeholders are part of the text, which is padded as a whole
INPUTS = ('pixel_values', 'input_ids', 'attention_mask', 'qformer_input_ids', 'qformer_attention_mask')

# [height, width] or [height, width, 1, 3 or 4]; anonymous axes, since images of one batch differ in size.
Picture = Image.Image | UInt8[np.ndarray, '_ _'] | UInt8[np.ndarray, '_ _ _']


@dataclass(frozen=True)
class Processor:
    """A directory's processor.

    Attributes:
      family: `model_type` of the directory, a key of `directory.CLASSES`.
      hf: the transformers processor.
      image_tokens: placeholders of one image.
      end: the token that generation stops at; the answers to train on end with it.
      start: the decoder's first token; None unless the language model is an encoder-decoder.
    """

    family: str
    hf: Any
    image_tokens: int
    end: int
    start: int | None

    def prompt(self, images: Sequence[Picture], texts: Sequence[str]) -> dict[str, np.ndarray]:
        """A batch to generate from, one image a text, padded to the longest text.

        A LLaVA text holds '<image>' once, e.g. 'USER: <image>\\nWhat is this? ASSISTANT:'; the others need none.
        What is transparent becomes white, as transformers has it.

        Returns:
          `pixel_values` float32 [batch, 3, height, width]; `input_ids`, `attention_mask` and, where the family has
          them, `token_type_ids`, `qformer_input_ids`, `qformer_attention_mask`: int32 [batch, tokens].

        Raises:
          DataError: not one image a text, a text with a wrong number of '<image>', an image that is none.
        """
        if not texts or len(images) != len(texts):
            raise DataError(f'{len(images)} images for {len(texts)} texts: one image a text is needed')
        texts = [self._with_image(text) for text in texts]
        arrays = [image[..., None] if isinstance(image, np.ndarray) and image.ndim == 2 else image for image in images]
        # Unless told, it may take a low array for one of channels first; PaliGemma's settings leave grey images grey.
        told = {'do_convert_rgb': True, 'input_data_format': 'channels_last'}
        try:
            made = self.hf(images=arrays, text=texts, padding=True, return_tensors='np', images_kwargs=told)
        except (ValueError, TypeError, OSError) as error:
            raise DataError(f'an image or a text that cannot be processed: {error}') from error
        names = INPUTS + ('token_type_ids',) * (self.family == 'paligemma')
        types = {'pixel_values': np.float32}
        return {name: made[name].astype(types.get(name, np.int32)) for name in names if name in made}

    def example(
        self, image: Picture, prompt: str, answer: str = '', *, prompt_tokens: int, answer_tokens: int
    ) -> dict[str, np.ndarray]:
        """One example to train on, its shapes the same for every text; without an answer, one to generate from.

        Returns:
          `pixel_values` [3, height, width];
          `input_ids`, `attention_mask`, PaliGemma's `token_type_ids` (1 on the answer), int32
          [image_tokens + prompt_tokens + answer_tokens - 1]: the prompt, then the answer but for its last token.
          The first image_tokens + prompt_tokens are all there is to generate from, and all that an encoder reads;
          `decoder_input_ids` int32 [answer_tokens]: of an encoder-decoder, the answer shifted by one;
          `targets` int32, `answer` bool [answer_tokens]: what the last `answer_tokens` positions predict, and which
          of them count;
          `qformer_input_ids`, `qformer_attention_mask` int32 [prompt_tokens].

        Raises:
          DataError: a prompt or an answer that does not fit, a prompt of no tokens, and as `prompt` does.
        """
        made = {name: value[0] for name, value in self.prompt([image], [prompt]).items()}
        target = [*self._answer(prompt, answer), self.end] if answer.strip() else []
        words = len(made['input_ids']) - self.image_tokens
        lengths = [('prompt', words, prompt_tokens), ('answer', len(target), answer_tokens)]
        if 'qformer_input_ids' in made:
            lengths.append(('prompt (as the Q-Former reads it)', len(made['qformer_input_ids']), prompt_tokens))
        if reason := _too_long(lengths):
            raise DataError(f'{reason}: {prompt!r} -> {answer!r}')
        if not words:
            raise DataError('the prompt is empty: there is no token to predict the answer from')

        pad = self.hf.tokenizer.pad_token_id
        inputs = _right(target[:-1], answer_tokens - 1, pad)
        read = _right([1] * len(target[:-1]), answer_tokens - 1, 0)
        out = {'pixel_values': made.pop('pixel_values')}
        for name, row in made.items():
            fill = {'input_ids': pad, 'qformer_input_ids': self._qformer_pad}.get(name, 0)
            if name.startswith('qformer'):
                out[name] = _right(row, prompt_tokens, fill)
            elif self.start is not None:
                out[name] = _right(row, self.image_tokens + prompt_tokens, fill)
            else:
                front = 0 if self.family in IN_TEXT else self.image_tokens
                pads = np.full(prompt_tokens - words, fill, np.int32)
                out[name] = np.concatenate([row[:front], pads, row[front:], inputs if name == 'input_ids' else read])
        if self.start is not None:
            out['decoder_input_ids'] = np.concatenate([np.int32([self.start]), inputs])
        return out | {'targets': _right(target, answer_tokens, pad), 'answer': np.arange(answer_tokens) < len(target)}

    def misfit(self, prompt: str, answer: str, *, prompt_tokens: int, answer_tokens: int | None = None) -> str:
        """Why `example` would refuse these texts, '' if it would not; no image is needed."""
        try:
            text = self._with_image(prompt)
        except DataError as error:
            return str(error)
        tokenizer = self.hf.tokenizer
        if self.family == 'paligemma':  # its processor's own way to put an image, a start and a line end around
            text = f'{tokenizer.bos_token}{text.removeprefix(str(self.hf.image_token))}\n'
            words = len(tokenizer(text, add_special_tokens=False)['input_ids'])
        else:
            words = len(tokenizer(text)['input_ids']) - (self.family in IN_TEXT)
        lengths = [('prompt', words, prompt_tokens)]
        if answer_tokens is not None:
            lengths.append(('answer', len(self._answer(prompt, answer)) + 1, answer_tokens))
        if self.family == 'instructblip':
            read = len(self.hf.qformer_tokenizer(text)['input_ids'])
            lengths.append(('prompt (as the Q-Former reads it)', read, prompt_tokens))
        return _too_long(lengths)

    def decode(self, ids: Integer[np.ndarray, 'batch tokens'] | Sequence[Sequence[int]]) -> list[str]:
        """Generated tokens as texts, without special tokens and the space around."""
        return [text.strip() for text in self.hf.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @property
    def _qformer_pad(self) -> int | None:
        return self.hf.qformer_tokenizer.pad_token_id if self.family == 'instructblip' else None

    def _with_image(self, text: str) -> str:
        """The text as the transformers processor wants it."""
        token = str(self.hf.image_token)
        found = text.count(token)
        if self.family == 'llava' and found != 1:
            raise DataError(f"a LLaVA prompt holds {token} once, e.g. 'USER: {token}\\n... ASSISTANT:'; got {text!r}")
        if found > (self.family in IN_TEXT):
            raise DataError(f'{token} stands for an image, and the one there is comes first; leave it out of {text!r}')
        return token + text if self.family == 'paligemma' and not found else text

    def _answer(self, prompt: str, answer: str) -> list[int]:
        """An answer's tokens as they follow the prompt's, its end not included."""
        tokenizer, answer = self.hf.tokenizer, answer.strip()
        tokens = tokenizer(answer, add_special_tokens=False)['input_ids']
        if self.start is None and self.family != 'paligemma':  # PaliGemma's stands on a line of its own
            # Tokenizers differ in what becomes of a first space, so the answer is read behind its prompt.
            space = '' if prompt[-1:].isspace() else ' '
            head, whole = (tokenizer(text)['input_ids'] for text in (prompt, prompt + space + answer))
            if whole[: len(head)] == head:  # else a token spans the border
                tokens = whole[len(head) :]
        return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens


def _too_long(lengths: Sequence[tuple[str, int, int]]) -> str:
    """The first of (what, tokens, room) that does not fit."""
    return next(
        (f'{name} of {length} tokens, at most {limit} fit' for name, length, limit in lengths if length > limit), ''
    )


def _right(row: Sequence[int] | np.ndarray, length: int, fill: int) -> Integer[np.ndarray, 'length']:
    """A row padded on the right."""
    return np.asarray([*row] + [fill] * (length - len(row)), np.int32)


def load_processor(folder: str | Path) -> Processor:
    """The processor of a BLIP-2, InstructBLIP, LLaVA or PaliGemma directory, tried on an image.

    Runs no code that lies in the directory. What an old one leaves out of the processor's settings is taken from
    config.json. Texts are padded on the left, those of a T5 encoder and of a Q-Former on the right.

    Raises:
      UnsupportedModelError: another `model_type`.
      DataError: a file is missing or unreadable, or what the processor makes does not fit config.json: another size
        of images, image token, or number of them.
    """
    folder = Path(folder)
    config = directory.read_config(folder)
    hf = directory.read_processor(folder, config)
    expected, text, vision = directory.image_tokens(config), config.text_config, config.vision_config
    start = None
    if text.is_encoder_decoder:
        start = getattr(text, 'decoder_start_token_id', None)
        start = text.pad_token_id if start is None else start
    end = directory.end_token(folder, config)
    end = hf.tokenizer.eos_token_id if end is None else end
    processor = Processor(config.model_type, hf, expected, end, start)

    image = hf.tokenizer.convert_tokens_to_ids(str(hf.image_token))
    try:
        text = str(hf.image_token) * (config.model_type in IN_TEXT) + 'a'
        made = processor.prompt([np.zeros((9, 9, 3), np.uint8)], [text])
    except DataError as error:
        raise DataError(f'{folder}: its processor fails on a black image: {error}') from error
    size, found = made['pixel_values'].shape[2:], int((made['input_ids'] == image).sum())
    if size != (vision.image_size,) * 2 or found != expected:
        raise DataError(
            f'{folder}: the processor makes {found} image tokens of {size[0]}x{size[1]} pixels, the model reads '
            f'{expected} of {vision.image_size}x{vision.image_size}: its files are of different models'
        )
    return processor
