"""The transformers processor of a Hugging Face directory, read without torch, its settings checked and complete."""

import json
from pathlib import Path
from typing import Any

import transformers

from sparselora_jax.runtime.errors import DataError, UnsupportedModelError

CLASSES = {
    'blip-2': transformers.Blip2Processor,
    'instructblip': transformers.InstructBlipProcessor,
    'llava': transformers.LlavaProcessor,
    'paligemma': transformers.PaliGemmaProcessor,
}
TOKENIZER_FILES = ('tokenizer.json', 'tokenizer.model', 'spiece.model', 'vocab.json', 'vocab.txt')


def read_config(folder: Path) -> Any:
    """config.json of a known family.

    Raises:
      DataError: the file is missing or unreadable.
      UnsupportedModelError: another `model_type`.
    """
    if not (folder / 'config.json').is_file():
        raise DataError(f'{folder}: no config.json; a model directory as transformers saves it is needed')
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a field of a wrong type raises one of huggingface_hub's own
        raise DataError(f'{folder}/config.json cannot be read: {error}') from error
    if config.model_type not in CLASSES:
        known = ', '.join(CLASSES)
        raise UnsupportedModelError(
            f'{folder}: no image processing for model_type {config.model_type!r}; known: {known}'
        )
    return config


def image_tokens(config: Any) -> int:
    """Placeholders of one image that the model fills."""
    if config.model_type in ('blip-2', 'instructblip'):
        return config.num_query_tokens
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return patches + (config.model_type == 'llava' and config.vision_feature_select_strategy == 'full')


def end_token(folder: Path, config: Any) -> int | None:
    """The token that generation stops at, the first one if there are several.

    BLIP-2 and InstructBLIP leave generation to their language model, which does not see generation_config.json.
    """
    end, file = config.text_config.eos_token_id, folder / 'generation_config.json'
    if config.model_type in ('llava', 'paligemma') and file.is_file():
        end = json.loads(file.read_text()).get('eos_token_id', end)
    return end[0] if isinstance(end, list) else end


def read_processor(folder: Path, config: Any) -> Any:
    """The processor, with the PIL image processor.

    Raises:
      DataError: a file is missing or unreadable, there is no image token, or it is not that of config.json.
    """
    _check_files(folder, config.model_type)
    try:
        hf = CLASSES[config.model_type].from_pretrained(folder, local_files_only=True)
        # The default is torchvision's where that is installed.
        images = transformers.AutoImageProcessor.from_pretrained(folder, backend='pil', local_files_only=True)
    except Exception as error:  # the tokenizers library raises no narrower one
        raise DataError(f'{folder}: its processor cannot be read: {error}') from error
    hf.image_processor = images
    _complete(hf, config)

    tokenizer, token = hf.tokenizer, str(hf.image_token)
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == tokenizer.unk_token_id:
        raise DataError(f'{folder}: no image token: the tokenizer does not know {token}')
    if config.image_token_id not in (None, found):
        raise DataError(f'{folder}: {token} is {found} to the tokenizer, {config.image_token_id} in config.json')
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise DataError(f'{folder}: the tokenizer has neither a pad nor an end token; see tokenizer_config.json')
        tokenizer.pad_token = tokenizer.eos_token
    return hf


def _check_files(folder: Path, family: str) -> None:
    """Transformers itself would take another tokenizer, or ask the hub, where a file is missing."""
    for where in (folder, folder / 'qformer_tokenizer')[: 1 + (family == 'instructblip')]:
        if not any((where / name).is_file() for name in TOKENIZER_FILES):
            raise DataError(f'{where}: no tokenizer (none of {", ".join(TOKENIZER_FILES)}); copy the original files')
    nested = folder / 'processor_config.json'  # newer directories hold the settings in there
    if not (folder / 'preprocessor_config.json').is_file() and not (
        nested.is_file() and '"image_processor"' in nested.read_text()
    ):
        raise DataError(f'{folder}: no preprocessor_config.json, which says how images are scaled; copy the original')


def _complete(hf: Any, config: Any) -> None:
    """Sets where to pad, and what directories leave out that were saved when the model added image tokens."""
    if config.model_type == 'llava' and hf.patch_size is None:
        hf.patch_size, hf.num_additional_image_tokens = config.vision_config.patch_size, 1
        hf.vision_feature_select_strategy = config.vision_feature_select_strategy
    if config.model_type in ('blip-2', 'instructblip') and hf.num_query_tokens is None:
        hf.num_query_tokens = config.num_query_tokens
    # T5 and the Q-Former count positions from the left, pads included.
    hf.tokenizer.padding_side = 'right' if config.text_config.is_encoder_decoder else 'left'
    if config.model_type == 'instructblip':
        hf.qformer_tokenizer.padding_side = 'right'
