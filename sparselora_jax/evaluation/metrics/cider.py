"""Compute CIDEr-D, the score that COCO's evaluation code reports as CIDEr."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the penalty for another length than the reference's, in words
SCALE = 10.0  # the factor in the definition of CIDEr-D
PERCENT = 100.0


class _Grams(NamedTuple):
    """Hold the n-grams of all captions for one n: one row for each n-gram that occurs in a caption."""

    caption: Int[np.ndarray, ' rows']  # which caption
    gram: Int[np.ndarray, ' rows']  # which n-gram, as a number
    count: Int[np.ndarray, ' rows']  # how often the caption holds it


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, ' images']:
    """Return the CIDEr-D of each image.

    The score of a set of images is the mean. An n-gram weighs less, the more images have it in their references
    (document frequency). So the score of an image depends on the other images: score the images of a subset anew
    instead of averaging the values of a larger set.

    The definition is that of Vedantam et al. (CIDEr: Consensus-based Image Description Evaluation, CVPR 2015, section
    6), and the result that of `pycocoevalcap.cider`. With one image each weight is log(1) = 0, so the score is 0.

    Args:
      predictions: one caption per image, as words separated by spaces (`ptb_tokenizer.tokenize`).
      references: the reference captions of each image, likewise. Each image has at least one.

    Returns:
      CIDEr-D times 100, as papers report it: from 0 to 1000.

    >>> cider_d(['a red bus', 'a dog'], [['a red bus'], ['two cats']]).round(1).tolist()
    [750.0, 0.0]
    """
    images = len(predictions)
    counts = [len(captions) for captions in references]
    image_of_reference = np.repeat(np.arange(images), counts)
    # The predictions come first, so caption i is the prediction for image i.
    captions = [*predictions, *(caption for captions in references for caption in captions)]
    image_of_caption = np.concatenate([np.arange(images), image_of_reference])
    words, caption_of_word = _word_numbers(captions)
    similarity = np.zeros(len(image_of_reference))
    lengths = np.zeros(len(captions))
    grams = words
    place_of_gram = np.arange(len(words))  # the place of the last word of each n-gram
    for order in range(1, ORDERS + 1):
        if order > 1:
            grams, place_of_gram = _extend(grams, place_of_gram, words, caption_of_word)
        rows = _count(caption_of_word[place_of_gram], grams)
        if order == 2:
            # The reference implementation measures length in bigrams, so captions of no and of one word are as long.
            lengths = np.bincount(rows.caption, weights=rows.count, minlength=len(captions))
        similarity += _cosines(rows, image_of_caption, images)
    difference = lengths[image_of_reference] - lengths[images:]
    similarity *= np.exp(-(difference**2) / (2 * SIGMA**2)) / ORDERS
    sums = np.bincount(image_of_reference, weights=similarity, minlength=images)
    return PERCENT * SCALE * sums / np.array(counts)


def _word_numbers(captions: Iterable[str]) -> tuple[Int[np.ndarray, ' words'], Int[np.ndarray, ' words']]:
    """Return all words of all captions as numbers, and the caption of each."""
    numbers: dict[str, int] = {}
    words: list[int] = []
    lengths: list[int] = []
    for caption in captions:
        split = caption.split()
        words.extend(numbers.setdefault(word, len(numbers)) for word in split)
        lengths.append(len(split))
    return np.array(words, np.int64), np.repeat(np.arange(len(lengths)), lengths)


def _extend(
    grams: Int[np.ndarray, ' grams'],
    place_of_gram: Int[np.ndarray, ' grams'],
    words: Int[np.ndarray, ' words'],
    caption_of_word: Int[np.ndarray, ' words'],
) -> tuple[Int[np.ndarray, ' longer'], Int[np.ndarray, ' longer']]:
    """Return the n-grams that are longer by one word, as numbers, and the place of the last word of each."""
    has_next = np.zeros(len(words), bool)
    has_next[:-1] = caption_of_word[:-1] == caption_of_word[1:]
    extended = has_next[place_of_gram]
    places = place_of_gram[extended] + 1
    # A pair of numbers as one. Small numbers again, by `unique`, keep the next pairs below 2**63.
    pairs = grams[extended] * (words.max(initial=0) + 1) + words[places]
    _, numbers = np.unique(pairs, return_inverse=True)
    return numbers, places


def _count(captions: Int[np.ndarray, ' grams'], grams: Int[np.ndarray, ' grams']) -> _Grams:
    """Return how often each caption has each of its n-grams."""
    kinds = grams.max(initial=0) + 1
    pairs, counts = np.unique(captions * kinds + grams, return_counts=True)
    return _Grams(caption=pairs // kinds, gram=pairs % kinds, count=counts)


def _cosines(
    rows: _Grams, image_of_caption: Int[np.ndarray, ' captions'], images: int
) -> Float[np.ndarray, ' references']:
    """Return the clipped cosine between each reference and the prediction of its image, for one n."""
    kinds = rows.gram.max(initial=0) + 1
    is_reference = rows.caption >= images
    # A gram counts once for an image, even if several of its references have it.
    in_image = image_of_caption[rows.caption] * kinds + rows.gram
    frequency = np.bincount(np.unique(in_image[is_reference]) % kinds, minlength=kinds)
    inverse_frequency = np.log(images) - np.log(np.maximum(frequency, 1))
    weight = rows.count * inverse_frequency[rows.gram]
    norm = np.sqrt(np.bincount(rows.caption, weights=weight**2, minlength=len(image_of_caption)))

    # Only n-grams that both captions have add to the product. Rows are sorted by caption and then by n-gram, and a
    # prediction has the number of its image: so the predictions' keys are sorted.
    keys = in_image[~is_reference]
    matches, row_in_prediction = _find(keys, in_image[is_reference])
    reference_weight = weight[is_reference][matches]
    clipped = np.minimum(weight[~is_reference][row_in_prediction], reference_weight)
    reference = rows.caption[is_reference][matches] - images
    products = np.bincount(reference, weights=clipped * reference_weight, minlength=len(image_of_caption) - images)
    norms = norm[image_of_caption[images:]] * norm[images:]
    # A norm is 0 if all n-grams of a caption are in all images, or if it has none. The product then is 0 too.
    return np.divide(products, norms, out=np.zeros(len(norms)), where=norms != 0)


def _find(
    sorted_keys: Int[np.ndarray, ' keys'], wanted: Int[np.ndarray, ' wanted']
) -> tuple[Int[np.ndarray, ' found'], Int[np.ndarray, ' found']]:
    """Return the positions of the wanted keys that exist, and where each is among the sorted keys."""
    if not len(sorted_keys):
        nothing = np.zeros(0, np.int64)
        return nothing, nothing
    places = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    matches = np.flatnonzero(sorted_keys[places] == wanted)
    return matches, places[matches]
