"""Search texts by images and images by texts, as LAVIS does for BLIP-2 (`compute_sim_matrix`).

1. Every image is compared with every text by their embeddings.
2. The best candidates of each search are scored again: the logit of "match", from a pass that reads image and text
   together, is added to the similarity. All others come after them.

An image and a text may be candidates of each other; LAVIS then runs the pass twice, and here it runs once. The pass
needs the vision tower's output of an image, which is megabytes. It is computed again for a few images at a time, and
all texts that the image is compared with follow. So memory does not grow with the number of images.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt8

from sparselora_jax.data.benchmarks.items import Items
from sparselora_jax.data.processing import Inputs, Processor
from sparselora_jax.data.task_format import TaskFormat
from sparselora_jax.evaluation.saved_arrays import SavedArrays
from sparselora_jax.models.model import Model
from sparselora_jax.runtime.ahead import READING_THREADS, map_ahead
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.progress import Progress

CANDIDATES = 128  # of each search that are scored again, as in the evaluation configs of LAVIS
MATCH = 1  # the head's second logit


class Search(NamedTuple):
    """Scores of all images and texts; the higher, the better they fit. Those of no candidates are minus infinity.

    Attributes:
      of_images: row i is the search of image i among all texts.
      of_texts: row t is the search of text t among all images.
      texts: the texts, as the data set writes them.
      image_of_text: the row of the image that each text describes.
    """

    of_images: Float32[np.ndarray, 'images texts']
    of_texts: Float32[np.ndarray, 'texts images']
    texts: list[str]
    image_of_text: Int[np.ndarray, ' texts']


def texts_of(items: Items) -> tuple[list[str], Int[np.ndarray, ' texts']]:
    """Return the references of all items, one after the other, and the item of each.

    Args:
      items: images with their captions.

    Raises:
      DataError: an image has no caption.
    """
    lengths = items.references.lengths[items.rows]
    without = np.flatnonzero(lengths == 0)
    if without.size:
        raise DataError(f'{items.name}: image {items[int(without[0])].image_id} has no caption, so no search finds it')
    texts = [items.texts[code] for row in items.rows for code in items.references[int(row)]]
    return texts, np.repeat(np.arange(len(items)), lengths)


# Jitted functions of the module, so that tasks and models of the same shapes share their programs.
@functools.partial(jax.jit, static_argnums=0)
def _features(model: Model, weights: dict, pixels: Array) -> Array:
    return model.family.image_features(weights, model.cfg, pixels)


@functools.partial(jax.jit, static_argnums=0)
def _image_embeddings(model: Model, weights: dict, pixels: Array) -> Array:
    features = model.family.image_features(weights, model.cfg, pixels)
    return model.family.image_embeddings(weights, model.cfg, features)


@functools.partial(jax.jit, static_argnums=0)
def _text_embeddings(model: Model, weights: dict, tokens: Array, mask: Array) -> Array:
    return model.family.text_embeddings(weights, model.cfg, tokens, mask.astype(bool))


@jax.jit
def _similarities(
    images: Float[Array, 'batch queries dim'], texts: Float[Array, 'texts dim']
) -> Float[Array, 'batch texts']:
    # The query that is nearest to a text counts. A GPU would round the products to TF32 by default.
    return jnp.einsum('iqd,td->itq', images, texts, precision='highest').max(axis=2)


@functools.partial(jax.jit, static_argnums=0)
def _match(model: Model, weights: dict, features: Array, row: Array, tokens: Array, mask: Array) -> Array:
    # The row is traced, so all images of a batch share one program.
    image = jax.lax.dynamic_index_in_dim(features, row, keepdims=True)
    return model.family.match_logits(weights, model.cfg, image, tokens, mask.astype(bool))[:, MATCH]


def search(
    model: Model,
    weights: dict,
    processor: Processor,
    items: Items,
    asked: TaskFormat,
    *,
    batch: int,
    answers_file: Path,
    owner: str,
    candidates: int = CANDIDATES,
    name: str = 'retrieval',
) -> Search:
    """Compare all images with all their captions, in both directions; continue after what the file has.

    Args:
      model: a model of a `RetrievalFamily`.
      weights: its params, or the result of `bind`.
      processor: its processor.
      items: images with their captions.
      asked: how texts are prepared.
      batch: number of images, of texts, or of texts of an image that are read at once.
      answers_file: file of the embeddings and scores so far, see `saved_arrays`.
      owner: what they depend on.
      candidates: number of candidates of each search that are scored again.
      name: label of the progress.

    Returns:
      The scores.

    Raises:
      DataError: an image cannot be read, or has no caption.
      StorageError: the file is damaged, or of another run.
    """
    texts, image_of_text = texts_of(items)
    prepared = [asked.text.write(asked.question(text)) for text in texts]
    inputs = processor.read_texts(prepared, asked.text.prompt_tokens)
    run = _Run(model, weights, processor, items, inputs, batch, SavedArrays(answers_file, owner), name)
    # The order of the steps in the file: images, texts, pairs.
    images = run.embed_images()
    score = compare(images, run.embed_texts(), batch)
    is_text_candidate = best(score, candidates)
    is_image_candidate = best(score.T, candidates).T
    is_matched = is_text_candidate | is_image_candidate
    # In place, since the matrix is large. Pairs are in the order of its rows.
    score[is_matched] += run.match(is_matched)
    of_images = np.where(is_text_candidate, score, np.float32(-np.inf))
    of_texts = np.where(is_image_candidate, score, np.float32(-np.inf)).T
    return Search(of_images, of_texts, texts, image_of_text)


def best(similarity: Float32[np.ndarray, 'rows columns'], count: int) -> Bool[np.ndarray, 'rows columns']:
    """Return which columns are among the best of each row.

    Args:
      similarity: the higher, the better.
      count: how many of each row; all if there are not more.

    >>> best(np.array([[0.1, 0.9, 0.5]], np.float32), 2).tolist()
    [[False, True, True]]
    """
    if count >= similarity.shape[1]:
        return np.ones(similarity.shape, bool)
    is_best = np.zeros(similarity.shape, bool)
    # Row by row: the indices of all rows would take twice the memory of the matrix.
    for row, values in enumerate(similarity):
        is_best[row, np.argpartition(-values, count - 1)[:count]] = True
    return is_best


def compare(
    images: Float32[np.ndarray, 'images queries dim'], texts: Float32[np.ndarray, 'texts dim'], batch: int
) -> Float32[np.ndarray, 'images texts']:
    """Return the similarity of each image and each text: the largest cosine of one of the image's embeddings.

    Args:
      images: the embeddings of each image, of length 1.
      texts: the embedding of each text, of length 1.
      batch: number of images that are compared at once.
    """
    on_device = jnp.asarray(texts)
    similarity = np.empty((len(images), len(texts)), np.float32)
    for indices in _batches(len(images), batch):
        # Indices that fill the last batch write the same row again.
        similarity[indices] = _similarities(images[indices], on_device)
    return similarity


def _batches(count: int, batch: int) -> list[list[int]]:
    """Return indices in batches of one size; the last index fills the last batch, so that one shape is compiled."""
    return [[min(index, count - 1) for index in range(first, first + batch)] for first in range(0, count, batch)]


@dataclass(frozen=True)
class _Run:
    """The steps of a search that read the model.

    Attributes:
      model: see `search`, as for the others.
      weights: its weights.
      processor: its processor.
      items: images with their captions.
      inputs: the tokens of all texts.
      batch: number of images or texts that are read at once.
      saved: the results so far.
      name: label of the progress.
    """

    model: Model
    weights: dict
    processor: Processor
    items: Items
    inputs: Inputs
    batch: int
    saved: SavedArrays
    name: str

    def embed_images(self) -> Float32[np.ndarray, 'images queries dim']:
        """Return the embeddings of all images."""
        return self._embed('images', len(self.items), self._embed_images)

    def embed_texts(self) -> Float32[np.ndarray, 'texts dim']:
        """Return the embeddings of all texts."""
        return self._embed('texts', len(self.inputs['input_ids']), self._embed_texts)

    def _embed(
        self, kind: str, count: int, embed: Callable[[list[int]], Float32[np.ndarray, 'batch ...']]
    ) -> Float32[np.ndarray, 'items ...']:
        """Return the embeddings of all items of a kind, batch by batch."""
        steps = _batches(count, self.batch)
        done = min(self.saved.count_saved(len(steps)) * self.batch, count)
        progress = Progress(f'{self.name}: {kind}', count, first=done)
        embeddings = []
        for indices in steps:
            is_new = not self.saved.is_next_saved
            embeddings.append(self.saved.step(functools.partial(embed, indices)))
            if is_new:
                progress(min(len(embeddings) * self.batch, count))
        return np.concatenate(embeddings)[:count]

    def _embed_images(self, indices: list[int]) -> Float32[np.ndarray, 'batch queries dim']:
        return np.asarray(_image_embeddings(self.model, self.weights, self._read_pixels(indices)))

    def _embed_texts(self, indices: list[int]) -> Float32[np.ndarray, 'batch dim']:
        return np.asarray(_text_embeddings(self.model, self.weights, *self._read_tokens(indices)))

    def match(self, is_matched: Bool[np.ndarray, 'images texts']) -> Float32[np.ndarray, ' pairs']:
        """Return the logit of "match" of each pair that is asked for, image by image.

        Args:
          is_matched: the pairs.
        """
        counts = is_matched.sum(axis=1)
        done = int(counts[: self.saved.count_saved(len(counts))].sum())
        progress = Progress(f'{self.name}: pairs', int(counts.sum()), first=done)
        logits = []
        for indices in _batches(len(self.items), self.batch):
            features = None
            for row, image in enumerate(dict.fromkeys(indices)):
                is_new = not self.saved.is_next_saved
                # A batch of which all images are done is not read again.
                if features is None and is_new:
                    features = _features(self.model, self.weights, self._read_pixels(indices))
                texts = np.flatnonzero(is_matched[image])
                logits.append(self.saved.step(functools.partial(self._match_image, features, row, texts)))
                if is_new:
                    progress(int(counts[: image + 1].sum()))
        return np.concatenate(logits)

    def _match_image(
        self, features: Float[Array, 'batch patches dim'], row: int, texts: Int[np.ndarray, ' texts']
    ) -> Float32[np.ndarray, ' texts']:
        """Return the logit of "match" of the image in a row of a batch with each of some texts."""
        results = []
        # No result is waited for before the last batch is on its way to the device.
        for indices in _batches(len(texts), self.batch):
            tokens, mask = self._read_tokens(texts[indices])
            results.append(_match(self.model, self.weights, features, np.int32(row), tokens, mask))
        return np.concatenate([np.asarray(result) for result in results])[: len(texts)]

    def _read_pixels(self, indices: Sequence[int]) -> Float32[np.ndarray, 'batch 3 height width']:
        # An index that fills the batch occurs again; its image is read once.
        places = {index: place for place, index in enumerate(dict.fromkeys(indices))}
        pictures = map_ahead(self._read_picture, places, ahead=len(places), threads=READING_THREADS)
        pixels = self.processor.read_images(list(pictures))['pixel_values']
        return pixels[[places[index] for index in indices]]

    def _read_picture(self, index: int) -> UInt8[np.ndarray, 'height width 3']:
        return self.items[index].image.read()

    def _read_tokens(
        self, indices: Sequence[int] | Int[np.ndarray, ' batch']
    ) -> tuple[Int32[np.ndarray, 'batch tokens'], Int32[np.ndarray, 'batch tokens']]:
        """Return the tokens of some texts, and their mask."""
        return self.inputs['input_ids'][indices], self.inputs['attention_mask'][indices]
