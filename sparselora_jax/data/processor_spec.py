"""Describes the processor of a model family: its class, and how it lays out texts and images.

`data/` does not depend on any family. Each family in `models/` creates a `ProcessorSpec` and registers it under
transformers' `model_type`.
"""

import enum
import importlib
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.runtime.registry import Registry

if TYPE_CHECKING:  # importing transformers takes seconds, and the embedded model does not need it
    import transformers


class ImagePlace(enum.Enum):
    """Where a processor puts an image's placeholder tokens.

    This also decides where the pads of a batch are: a processor pads either the text alone or the whole prompt.
    """

    BEFORE_PADS = '[image][pads][text]: the text is padded alone and never mentions the image'
    BEFORE_TEXT = '[pads][image][text]: the image comes first, and the prompt is padded as a whole'
    IN_TEXT = '[pads][text, with the image in it]: the text says once where the image belongs'
    APART = '[text][pads]: image and text are inputs of their own, and the text has no placeholder'


def _change_nothing(processor: 'transformers.ProcessorMixin', config: 'transformers.PretrainedConfig') -> None:
    """Leave the processor unchanged."""


@dataclass(frozen=True)
class ProcessorSpec:
    """The processor of a model family.

    Attributes:
      class_name: name of a transformers class, such as 'LlavaProcessor', or of another class as 'package.module:Name'.
      text: the text format for directories without text_format.json.
      count_image_tokens: maps a transformers config to the number of placeholder tokens for one image.
      image_place: where these placeholders are.
      prompt_template: the template with `{bos}` and `{text}` that the processor itself applies; '' if the tokenizer
        alone adds the special tokens. After a template, the answer is tokenized as a separate text.
      has_token_types: the processor returns `token_type_ids`, which are 0 on the prompt and 1 on the answer.
      has_instruction: a Q-Former reads the text too, through its own tokenizer in `qformer_tokenizer/`.
      reads_generation_config: use the end token of generation_config.json; False: use that of the language model's
        config.
      complete: fills in processor settings that are missing in old directories, from the transformers config.
    """

    class_name: str
    text: TextFormat
    count_image_tokens: Callable[['transformers.PretrainedConfig'], int]
    image_place: ImagePlace
    prompt_template: str = ''
    has_token_types: bool = False
    has_instruction: bool = False
    reads_generation_config: bool = True
    complete: Callable[['transformers.ProcessorMixin', 'transformers.PretrainedConfig'], None] = _change_nothing

    @property
    def pads_whole_prompt(self) -> bool:
        """Return whether the pads of a batch come before the image."""
        return self.image_place in (ImagePlace.BEFORE_TEXT, ImagePlace.IN_TEXT)

    def find_class(self) -> type:
        """Return the processor's class, a subclass of `transformers.ProcessorMixin`."""
        # Imported late: specs are created when the package is imported, and importing transformers takes seconds.
        module, _, name = self.class_name.rpartition(':')
        return getattr(importlib.import_module(module or 'transformers'), name)


# Keys are transformers' `model_type`, see `kind_of_model`. The string begins the error message for an unknown key.
PROCESSORS: Registry[ProcessorSpec] = Registry('image processing of model_type')


def kind_of_model(known: Container[str], model_type: str, architectures: object) -> str:
    """Return the key under which a kind of model is registered: `model_type`, or `model_type/architecture`.

    Some classes of transformers share a `model_type`, though one generates text and another compares images with texts.

    Args:
      known: the registered keys.
      model_type: the `model_type` in config.json.
      architectures: the `architectures` in config.json, the names of classes; files may lack them.

    >>> kind_of_model({'blip', 'blip/Matcher'}, 'blip', ['Matcher'])
    'blip/Matcher'
    >>> kind_of_model({'blip', 'blip/Matcher'}, 'blip', None)
    'blip'
    """
    names = architectures if isinstance(architectures, list | tuple) else ()
    keys = (f'{model_type}/{name}' for name in names)
    return next((key for key in keys if key in known), model_type)
