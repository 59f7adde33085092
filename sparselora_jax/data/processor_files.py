"""Read the transformers processor of a Hugging Face directory without torch, and complete its settings."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselora_jax.data.model_config import REMEDY, Rule, is_count, is_positive
from sparselora_jax.data.processor_spec import PROCESSORS, ImagePlace, ProcessorSpec, kind_of_model
from sparselora_jax.runtime.errors import DataError, UnsupportedModelError
from sparselora_jax.runtime.files import StorageError, read_json

if TYPE_CHECKING:
    import transformers

TOKENIZER_FILES = ('tokenizer.json', 'tokenizer.model', 'spiece.model', 'vocab.json', 'vocab.txt')


# Rules of the settings of an image processor, as of `model_config.VALUES`.
_IMAGE_VALUES = (
    Rule('image_mean', lambda value: _is_colour(value, math.isfinite), 'three numbers'),
    Rule('image_std', lambda value: _is_colour(value, is_positive), 'three numbers above 0'),
    Rule('rescale_factor', is_positive, 'a number above 0'),
    Rule('resample', lambda value: is_count(value, 0, 5), 'the number of a filter of Pillow, from 0 to 5'),
    Rule('do_[a-z_]+', lambda value: isinstance(value, bool), 'true or false'),
    Rule(
        'size|crop_size|pad_size',
        lambda value: all(is_count(side) for side in dict(value).values() if side is not None),
        'whole numbers above 0',
    ),
)


def _is_colour(value: object, is_legal: Callable[[Any], bool]) -> bool:
    """Return whether a value has a legal number for each of the three colours."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return False
    return all(isinstance(number, int | float) and is_legal(number) for number in value)


def find_spec(folder: Path, model_type: str, architectures: object = None) -> ProcessorSpec:
    """Return the registered processor description for a kind of model.

    Args:
      folder: the model directory, for error messages.
      model_type: the `model_type` in config.json.
      architectures: the `architectures` in config.json.

    Returns:
      The description that a family registered.

    Raises:
      UnsupportedModelError: no family registered one for this `model_type`.
    """
    kind = kind_of_model(PROCESSORS, model_type, architectures)
    if kind not in PROCESSORS:
        known = ', '.join(PROCESSORS)
        raise UnsupportedModelError(f'{folder}: no image processing for model_type {model_type!r}; known: {known}')
    return PROCESSORS.find(kind)


def find_end_token(folder: Path, config: 'transformers.PretrainedConfig', spec: ProcessorSpec) -> int | None:
    """Return the end token of generation (the first if there are several), or None if no file names one.

    Args:
      folder: the directory, which may hold a generation_config.json.
      config: the content of config.json.
      spec: decides which of the two files is used.

    Raises:
      StorageError: generation_config.json is damaged.
    """
    end = config.text_config.eos_token_id
    file = folder / 'generation_config.json'
    if spec.reads_generation_config and file.is_file():
        end = read_json(file, REMEDY).get('eos_token_id', end)
    if isinstance(end, list):
        return end[0] if end else None
    return end


def read_processor(
    folder: Path, config: 'transformers.PretrainedConfig', spec: ProcessorSpec
) -> 'transformers.ProcessorMixin':
    """Read the processor, with an image processor that works on PIL images and needs no torch.

    Args:
      folder: a Hugging Face directory.
      config: the content of config.json.
      spec: description of the processor of this model family.

    Returns:
      The transformers processor; its tokenizer pads on the side that the model expects.

    Raises:
      DataError: a file is missing or unreadable, the tokenizer has no image token, or config.json names another one.
      StorageError: a file of settings is damaged, or a setting of images is impossible.
    """
    import transformers

    _check_files(folder, spec)
    try:
        processor = spec.find_class().from_pretrained(folder, local_files_only=True)
        # Without `backend`, transformers uses torchvision's image processor if torchvision is installed.
        images = transformers.AutoImageProcessor.from_pretrained(folder, backend='pil', local_files_only=True)
    except Exception as error:  # the tokenizers library raises no narrower error
        raise DataError(f'{folder}: its processor cannot be read: {error}') from error
    _check_images(_image_settings(folder), images.to_dict())
    processor.image_processor = images
    spec.complete(processor, config)
    _set_padding_sides(processor, config, spec)

    tokenizer = processor.tokenizer
    # A text that is apart from its image has no image token.
    if spec.image_place is not ImagePlace.APART:
        _check_image_token(folder, processor, config)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise DataError(f'{folder}: the tokenizer has neither a pad nor an end token; see tokenizer_config.json')
        # LLaMA's tokenizers name no pad token. Any token will do, since the attention mask hides pads.
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def _check_image_token(
    folder: Path, processor: 'transformers.ProcessorMixin', config: 'transformers.PretrainedConfig'
) -> None:
    """Check that the tokenizer has the model's image token.

    Raises:
      DataError: it has none, or config.json names another one.
    """
    tokenizer = processor.tokenizer
    token = str(processor.image_token)
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise DataError(f'{folder}: no image token: the tokenizer does not know {token}')
    if config.image_token_id not in (None, token_id):
        raise DataError(f'{folder}: {token} has id {token_id} in the tokenizer, {config.image_token_id} in config.json')


def _check_files(folder: Path, spec: ProcessorSpec) -> None:
    """Check that the processor's files exist; otherwise transformers uses another tokenizer, or asks the hub."""
    tokenizer_folders = [folder]
    if spec.has_instruction:
        tokenizer_folders.append(folder / 'qformer_tokenizer')
    for where in tokenizer_folders:
        if not any((where / name).is_file() for name in TOKENIZER_FILES):
            raise DataError(f'{where}: no tokenizer (none of {", ".join(TOKENIZER_FILES)}); copy the original files')
    file = _image_settings(folder)
    if not file.is_file():
        raise DataError(f'{folder}: no preprocessor_config.json, which says how images are scaled; copy the original')
    read_json(file, REMEDY)


def _image_settings(folder: Path) -> Path:
    """Return the file of the settings of images, which need not exist.

    Raises:
      StorageError: processor_config.json is damaged.
    """
    # Newer directories keep the image settings inside processor_config.json.
    nested = folder / 'processor_config.json'
    if nested.exists() and 'image_processor' in read_json(nested, REMEDY):
        return nested
    return folder / 'preprocessor_config.json'


def _check_images(file: Path, settings: Mapping[str, Any]) -> None:
    """Check the settings of images.

    Args:
      file: their file, for the message.
      settings: the settings, completed by transformers' defaults.

    Raises:
      StorageError: a value is impossible; names the field, its value and what is expected.
    """
    for rule in _IMAGE_VALUES:
        for name, value in settings.items():
            if value is not None and re.fullmatch(rule.names, name) and not rule.accepts(value):
                raise StorageError(f'{file}: {name} {value!r}: expected {rule.expected}; {REMEDY}')


def _set_padding_sides(
    processor: 'transformers.ProcessorMixin', config: 'transformers.PretrainedConfig', spec: ProcessorSpec
) -> None:
    # An encoder and a Q-Former count positions from the left, including pads, so their pads must come last. A decoder
    # continues where its prompt ends, so its pads must come first.
    is_read_by_encoder = config.text_config.is_encoder_decoder or spec.image_place is ImagePlace.APART
    processor.tokenizer.padding_side = 'right' if is_read_by_encoder else 'left'
    if spec.has_instruction:
        processor.qformer_tokenizer.padding_side = 'right'
