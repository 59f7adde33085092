"""What a family says about the processor of its directories: which class it is and how it lays texts and images out.

`data/` knows no family. Each family describes its processor here, beside its other knowledge (`models/`), and registers
the description under transformers' `model_type`.
"""

import enum
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.runtime.registry import Registry

if TYPE_CHECKING:  # importing transformers takes seconds; who only trains the embedded model should not wait for it
    import transformers


class ImagePlace(enum.Enum):
    """Where a processor puts an image's placeholder tokens.

    The place decides where the pads of a batch lie, since a processor pads either the text alone or all of a prompt.
    """

    BEFORE_PADS = '[image][pads][text]: the text is padded alone and never mentions the image'
    BEFORE_TEXT = '[pads][image][text]: the image comes first, and the prompt is padded as a whole'
    IN_TEXT = '[pads][text, with the image in it]: the text says once where the image belongs'


def _change_nothing(processor: 'transformers.ProcessorMixin', config: 'transformers.PretrainedConfig') -> None:
    """Accept a processor as its directory describes it."""


@dataclass(frozen=True)
class ProcessorSpec:
    """A family's processor.

    Attributes:
      class_name: a class of transformers, such as 'LlavaProcessor', or another one as 'package.module:Name'.
      text: how questions are written where a directory holds no text_format.json.
      count_image_tokens: from a transformers config to the number of placeholder tokens of one image.
      image_place: where these placeholders lie.
      prompt_template: how the processor itself finishes a text, with `{bos}` and `{text}` in it; '' if the tokenizer
        alone adds the special tokens. An answer behind a template begins anew, as on a line of its own.
      has_token_types: the processor returns `token_type_ids`, which are 0 on the prompt and 1 on the answer.
      has_instruction: a Q-Former reads the text too, by a tokenizer of its own in `qformer_tokenizer/`.
      reads_generation_config: generation stops at the end token of generation_config.json; False: at that of the
        language model's own config.
      complete: sets what old directories leave out of the processor's settings, from the transformers config.
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
        return self.image_place is not ImagePlace.BEFORE_PADS

    def find_class(self) -> type:
        """Return the processor's class, a subclass of `transformers.ProcessorMixin`."""
        # Imported only now: specs exist as soon as the package is imported, and transformers takes seconds.
        module, _, name = self.class_name.rpartition(':')
        return getattr(importlib.import_module(module or 'transformers'), name)


# By transformers' `model_type`. The kind's name is the beginning of the error for an unknown one.
PROCESSORS: Registry[ProcessorSpec] = Registry('image processing of model_type')
