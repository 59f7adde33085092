"""Reads the transformers processor of a Hugging Face directory without torch, and completes its settings."""

from pathlib import Path
from typing import TYPE_CHECKING

from sparselora_jax.data.processor_spec import PROCESSORS, ProcessorSpec
from sparselora_jax.runtime.errors import DataError, UnsupportedModelError
from sparselora_jax.runtime.files import read_json

if TYPE_CHECKING:
    import transformers

TOKENIZER_FILES = ('tokenizer.json', 'tokenizer.model', 'spiece.model', 'vocab.json', 'vocab.txt')


def read_config(folder: Path) -> 'transformers.PretrainedConfig':
    """Read config.json, without running any code from the directory.

    Args:
      folder: a Hugging Face directory.

    Returns:
      The transformers config.

    Raises:
      DataError: the file is missing or unreadable.
    """
    import transformers

    if not (folder / 'config.json').is_file():
        raise DataError(f'{folder}: no config.json; a model directory as transformers saves it is needed')
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a field of a wrong type raises one of huggingface_hub's own errors
        raise DataError(f'{folder}/config.json cannot be read: {error}') from error


def find_spec(folder: Path, model_type: str) -> ProcessorSpec:
    """Return the registered processor description for a `model_type`.

    Args:
      folder: the model directory, for error messages.
      model_type: the `model_type` in config.json.

    Returns:
      The description that a family registered.

    Raises:
      UnsupportedModelError: no family registered one for this `model_type`.
    """
    if model_type not in PROCESSORS:
        known = ', '.join(PROCESSORS)
        raise UnsupportedModelError(f'{folder}: no image processing for model_type {model_type!r}; known: {known}')
    return PROCESSORS.find(model_type)


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
        end = read_json(file, 'download it again').get('eos_token_id', end)
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
    """
    import transformers

    _check_files(folder, spec)
    try:
        processor = spec.find_class().from_pretrained(folder, local_files_only=True)
        # Without `backend`, transformers uses torchvision's image processor if torchvision is installed.
        images = transformers.AutoImageProcessor.from_pretrained(folder, backend='pil', local_files_only=True)
    except Exception as error:  # the tokenizers library raises no narrower error
        raise DataError(f'{folder}: its processor cannot be read: {error}') from error
    processor.image_processor = images
    spec.complete(processor, config)
    _set_padding_sides(processor, config, spec)

    tokenizer = processor.tokenizer
    token = str(processor.image_token)
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise DataError(f'{folder}: no image token: the tokenizer does not know {token}')
    if config.image_token_id not in (None, token_id):
        raise DataError(f'{folder}: {token} has id {token_id} in the tokenizer, {config.image_token_id} in config.json')
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise DataError(f'{folder}: the tokenizer has neither a pad nor an end token; see tokenizer_config.json')
        # LLaMA's tokenizers name no pad token. Any token will do, since the attention mask hides pads.
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def _check_files(folder: Path, spec: ProcessorSpec) -> None:
    """Check that the processor's files exist; otherwise transformers uses another tokenizer, or asks the hub."""
    tokenizer_folders = [folder]
    if spec.has_instruction:
        tokenizer_folders.append(folder / 'qformer_tokenizer')
    for where in tokenizer_folders:
        if not any((where / name).is_file() for name in TOKENIZER_FILES):
            raise DataError(f'{where}: no tokenizer (none of {", ".join(TOKENIZER_FILES)}); copy the original files')
    # Newer directories keep the image settings inside processor_config.json.
    nested = folder / 'processor_config.json'
    is_nested = nested.is_file() and '"image_processor"' in nested.read_text()
    if not is_nested and not (folder / 'preprocessor_config.json').is_file():
        raise DataError(f'{folder}: no preprocessor_config.json, which says how images are scaled; copy the original')


def _set_padding_sides(
    processor: 'transformers.ProcessorMixin', config: 'transformers.PretrainedConfig', spec: ProcessorSpec
) -> None:
    # An encoder and a Q-Former count positions from the left, including pads, so their pads must come last. A decoder
    # continues where its prompt ends, so its pads must come first.
    processor.tokenizer.padding_side = 'right' if config.text_config.is_encoder_decoder else 'left'
    if spec.has_instruction:
        processor.qformer_tokenizer.padding_side = 'right'
