"""BLIP-2's first training stage (arXiv 2301.12597, section 3.2): a model that compares images with texts.

It has the vision tower and the Q-Former of BLIP-2 and no language model. The Q-Former also reads text, in two ways:

- Contrast (ITC): image and text are embedded apart from each other. Their similarity is the largest cosine of a query's
  embedding and the text's.
- Matching (ITM): queries and text attend to each other, and queries attend to the image. A head says of each query
  whether image and text belong together; the logits are averaged over the queries.

Checkpoints such as `Salesforce/blip2-itm-vit-g-coco` are read by transformers as `Blip2ForImageTextRetrieval`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.data.processor_spec import ImagePlace
from sparselora_jax.data.task_format import TaskFormat, TaskKind, clean_caption
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.models import key_table, layers, qformer, towers
from sparselora_jax.models.blip2 import Blip2Family
from sparselora_jax.models.config import HfConfig, VisionConfig
from sparselora_jax.models.family import Family, RetrievalFamily, register_family
from sparselora_jax.models.key_table import Keys
from sparselora_jax.models.runners import Runner, scan_blocks

# Tokens that LAVIS pads or cuts every text to, [CLS] and [SEP] included.
TEXT_TOKENS = 35


@dataclass(frozen=True)
class Blip2RetrievalConfig:
    """The towers of a retrieval model.

    Attributes:
      vision: the vision tower.
      qformer: the Q-Former, which reads texts too.
      embedding_width: size of the embeddings that are compared.
      language: None: there is no language tower.
    """

    language: ClassVar[None] = None

    vision: VisionConfig
    qformer: qformer.QFormerConfig
    embedding_width: int

    @property
    def family(self) -> Family:
        """Return the family of this config."""
        return FAMILY


class Blip2RetrievalFamily(RetrievalFamily):
    """BLIP-2's retrieval model."""

    name = 'blip2_retrieval'
    tower_names = ('vision', 'qformer')
    ignored = (r'.*\.?position_ids',)
    processor = replace(
        Blip2Family.processor,
        text=TextFormat('{}', prompt_tokens=TEXT_TOKENS, answer_tokens=1),
        count_image_tokens=lambda hf: 0,
        image_place=ImagePlace.APART,
    )
    # The file would describe a language model that these models do not have.
    reads_generation_config = False

    def from_hf(self, hf: HfConfig) -> Blip2RetrievalConfig:
        """Convert the `Blip2Config` of a `Blip2ForImageTextRetrieval`; its `text_config` is not used.

        Args:
          hf: the transformers config.

        Returns:
          Our config.

        Raises:
          UnsupportedModelError: a field's value is not supported; names the field.
        """
        return Blip2RetrievalConfig(
            vision=towers.vision_from_hf(hf.vision_config),
            qformer=qformer.from_hf(hf.qformer_config, hf.num_query_tokens, compares_texts=True),
            embedding_width=hf.image_text_hidden_size,
        )

    def image_features(
        self,
        w: dict,
        cfg: Blip2RetrievalConfig,
        images: Float[Array, 'batch 3 height width'],
        run: Runner = scan_blocks,
    ) -> Float[Array, 'batch patches dim']:
        """Return the vision tower's output.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          images: normalised pixels.
          run: executes the tower's blocks.
        """
        # The tower computes in the dtype of the weights.
        images = images.astype(w['qformer']['queries'].dtype)
        return cfg.vision.tower.forward(w['vision'], cfg.vision, images, run)

    def image_embeddings(
        self, w: dict, cfg: Blip2RetrievalConfig, features: Float[Array, 'batch patches dim'], run: Runner = scan_blocks
    ) -> Float[Array, 'batch queries embedding']:
        """Return an embedding of length 1 for each query.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          features: the vision tower's output.
          run: executes the Q-Former's blocks.
        """
        queries = qformer.forward_image(w['qformer'], cfg.qformer, features, run)
        return _normalised(layers.dense(w['image_projection'], queries))

    def text_embeddings(
        self,
        w: dict,
        cfg: Blip2RetrievalConfig,
        tokens: Int[Array, 'batch tokens'],
        valid: Bool[Array, 'batch tokens'],
        run: Runner = scan_blocks,
    ) -> Float[Array, 'batch embedding']:
        """Return an embedding of length 1 for each text, from its first token, [CLS].

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          tokens: the texts.
          valid: False marks a pad.
          run: executes the Q-Former's blocks.
        """
        hidden = qformer.forward_text(w['qformer'], cfg.qformer, tokens, valid, run)
        return _normalised(layers.dense(w['text_projection'], hidden[:, 0]))

    def hidden(
        self, w: dict, cfg: Blip2RetrievalConfig, batch: dict, run: Runner = scan_blocks
    ) -> Float[Array, 'batch queries dim']:
        """Return the hidden states of the queries that have read image and text: the input of the matching head.

        This pass reads every kernel of the towers once, so it is the one to calibrate on.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          batch: `pixel_values`, `input_ids` and `attention_mask`.
          run: executes the towers' blocks.
        """
        tokens = batch['input_ids']
        valid = batch.get('attention_mask', jnp.ones_like(tokens)).astype(bool)
        features = self.image_features(w, cfg, batch['pixel_values'], run)
        return self._read_both(w, cfg, features, tokens, valid, run)

    def match_logits(
        self,
        w: dict,
        cfg: Blip2RetrievalConfig,
        features: Float[Array, '#batch patches dim'],
        tokens: Int[Array, 'batch tokens'],
        valid: Bool[Array, 'batch tokens'],
        run: Runner = scan_blocks,
    ) -> Float[Array, 'batch 2']:
        """Return the logits of "no match" and "match", averaged over the queries, in fp32.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          features: the vision tower's output for the image of each text, or for one image that all texts share.
          tokens: the texts.
          valid: False marks a pad.
          run: executes the Q-Former's blocks.
        """
        queries = self._read_both(w, cfg, features, tokens, valid, run)
        return layers.dense(w['match_head'], queries).astype(jnp.float32).mean(axis=1)

    def _read_both(
        self,
        w: dict,
        cfg: Blip2RetrievalConfig,
        features: Float[Array, '#batch patches dim'],
        tokens: Int[Array, 'batch tokens'],
        valid: Bool[Array, 'batch tokens'],
        run: Runner,
    ) -> Float[Array, 'batch queries width']:
        """Return the queries' hidden states after the pass over image and text."""
        batch = {'qformer_input_ids': tokens, 'qformer_attention_mask': valid}
        return qformer.forward(w['qformer'], cfg.qformer, features, batch, run)

    def task_format(self, cfg: Blip2RetrievalConfig, kind: TaskKind) -> TaskFormat:
        """Return how texts are prepared, as LAVIS does.

        Args:
          cfg: the family's config.
          kind: kind of task.

        Raises:
          UnsupportedModelError: the task is not retrieval.
        """
        self.check_kind(kind)
        return TaskFormat(self.processor.text, clean=clean_caption)

    def vocabularies(self, cfg: Blip2RetrievalConfig) -> dict[str, int]:
        """Return the batch arrays that contain tokens, with their vocabulary sizes.

        Args:
          cfg: the family's config.
        """
        return {'input_ids': cfg.qformer.vocab}

    def shapes(self, cfg: Blip2RetrievalConfig) -> dict:
        """Return the shape of every parameter, as a params tree of tuples.

        Args:
          cfg: the family's config.
        """

        def head(outputs: int) -> dict:
            return {'kernel': (cfg.qformer.width, outputs), 'bias': (outputs,)}

        return {
            'vision': cfg.vision.tower.shapes(cfg.vision),
            'qformer': qformer.shapes(cfg.qformer),
            'image_projection': head(cfg.embedding_width),
            'text_projection': head(cfg.embedding_width),
            'match_head': head(2),
        }

    def keys(self, cfg: Blip2RetrievalConfig) -> Keys:
        """Return the key table: our paths -> parameter names in transformers' `Blip2ForImageTextRetrieval`.

        Args:
          cfg: the family's config.
        """
        table = key_table.nested(cfg.vision.tower.keys(cfg.vision), 'vision/', 'vision_model.')
        table |= key_table.nested(qformer.keys(cfg.qformer), 'qformer/', '')
        # Text embeddings are a module beside the Q-Former. The norm is the Q-Former's, as where it reads images only.
        table['qformer/embed'] = 'embeddings.word_embeddings.weight'
        table['qformer/positions'] = 'embeddings.position_embeddings.weight'
        table |= key_table.norm('qformer/norm', 'qformer.layernorm')
        table |= key_table.dense('image_projection', 'vision_projection')
        table |= key_table.dense('text_projection', 'text_projection')
        return table | key_table.dense('match_head', 'itm_head')


def _normalised(x: Float[Array, '*batch dim']) -> Float[Array, '*batch dim']:
    """Return vectors of length 1, in fp32."""
    x = x.astype(jnp.float32)
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    # The bound is torch's: a vector of zeros stays one.
    return x / jnp.maximum(length, 1e-12)


FAMILY = register_family(Blip2RetrievalFamily(), 'blip-2/Blip2ForImageTextRetrieval')
