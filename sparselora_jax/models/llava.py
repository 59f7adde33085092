"""LLaVA-1.5 (arXiv 2310.03744): CLIP's penultimate layer -> two-layer MLP -> soft words of LLaMA."""

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Array, Float

from sparselora_jax.models import keys as names
from sparselora_jax.models import layers, towers, vit
from sparselora_jax.models.runners import scan_blocks
from sparselora_jax.runtime.errors import UnsupportedModelError

# Three layouts: as saved before transformers 4.52 and by default since (`language_model.model.`, `vision_tower.`), with
# `model.` before all but the head, and with `vision_model.` in the vision tower's names, as version 4 had it.
RENAMES = [
    (r'^language_model\.lm_head\.', 'lm_head.'),
    (r'^(model\.)?language_model\.(model\.)?', 'model.language_model.'),
    (r'^(model\.)?vision_tower\.(vision_model\.)?', 'model.vision_tower.'),
    (r'^(model\.)?multi_modal_projector\.', 'model.multi_modal_projector.'),
]
IGNORED = [
    r'.*\.position_ids',
    r'.*\.rotary_emb\.inv_freq',
    # Only where the key table does not name them: what lies behind the layer whose output is read.
    r'model\.vision_tower\.encoder\.layers\..*',
    r'model\.vision_tower\.(post_layernorm|head)\..*',
]


@dataclass(frozen=True)
class LlavaConfig:
    vision: vit.ViTConfig
    language: Any
    image_token: int
    activation: str = 'gelu'  # of the projector
    projector_bias: bool = True

    @property
    def image_tokens(self) -> int:
        """Soft words of an image."""
        return self.vision.kept


def soft_words(w: dict, cfg: LlavaConfig, batch: dict, run=scan_blocks) -> Float[Array, 'batch patches dim']:
    """Images -> soft words in the language model's embedding space."""
    image = vit.forward(w['vision'], cfg.vision, batch['pixel_values'], run)
    hidden = layers.ACTIVATIONS[cfg.activation](layers.dense(w['projector']['fc1'], image))
    return layers.dense(w['projector']['fc2'], hidden)


def prompt(w: dict, cfg: LlavaConfig, batch: dict, run=scan_blocks) -> towers.Prompt:
    """The language model's input: words, with the soft words in the places of the image tokens."""
    return towers.prompt(w, cfg, batch, lambda batch: soft_words(w, cfg, batch, run))


def shapes(cfg: LlavaConfig) -> dict:
    """The shape of every parameter, as a params tree of tuples."""
    d = cfg.language.width
    bias = {'bias': (d,)} if cfg.projector_bias else {}
    return {
        'vision': vit.shapes(cfg.vision),
        'projector': {'fc1': {'kernel': (cfg.vision.width, d)} | bias, 'fc2': {'kernel': (d, d)} | bias},
        'language': towers.shapes(cfg.language),
    }


def keys(cfg: LlavaConfig) -> names.Keys:
    """Our path -> transformers' name in `LlavaForConditionalGeneration`."""
    table = names.nested(vit.keys(cfg.vision), 'vision/', 'model.vision_tower.')
    for ours, theirs in {'fc1': 'linear_1', 'fc2': 'linear_2'}.items():
        table |= names.dense(f'projector/{ours}', f'model.multi_modal_projector.{theirs}', bias=cfg.projector_bias)
    return table | towers.keys(cfg.language, 'model.language_model.', '')


def from_hf(hf: Any) -> LlavaConfig:
    """The config of a transformers `LlavaConfig`.

    Raises:
      UnsupportedModelError: names the field whose value is not supported.
    """
    layer, strategy = hf.vision_feature_layer, hf.vision_feature_select_strategy
    if not isinstance(layer, int):
        raise UnsupportedModelError(f'vision_feature_layer {layer} of llava: expected one integer')
    if strategy not in ('default', 'full'):
        raise UnsupportedModelError(
            f"vision_feature_select_strategy {strategy!r} of llava: expected 'default' or 'full'"
        )
    return LlavaConfig(
        vision=vit.from_hf(hf.vision_config, layer=layer, drop_first=strategy == 'default'),
        # The whole model's field ties the head, not the text config's.
        language=replace(towers.from_hf(hf.text_config), tied=hf.tie_word_embeddings),
        image_token=hf.image_token_id,
        activation=layers.known_activation(hf.projector_hidden_act, 'the projector'),
        projector_bias=hf.multimodal_projector_bias,
    )
