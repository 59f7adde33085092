"""Score generated captions as COCO's and nocaps' evaluation code does: CIDEr, BLEU and ROUGE-L.

METEOR is optional (`meteor.meteor`), because it needs Java and another package. SPICE is left out: its package
downloads Stanford CoreNLP when it is first used, and its Java program fails on Java 16 and later, which hide the fields
that it reads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from sparselora_jax.evaluation.metric import MetricError
from sparselora_jax.evaluation.metrics.bleu import BleuCounts, bleu_counts
from sparselora_jax.evaluation.metrics.cider import cider_d
from sparselora_jax.evaluation.metrics.meteor import Meteor, meteor
from sparselora_jax.evaluation.metrics.ptb_tokenizer import tokenize
from sparselora_jax.evaluation.metrics.rouge import rouge_l
from sparselora_jax.runtime.errors import DataError

BLEU_NAMES = ('BLEU-1', 'BLEU-2', 'BLEU-3', 'BLEU-4')
ROUGE_NAME = 'ROUGE-L'
CIDER_NAME = 'CIDEr'
METEOR_NAME = 'METEOR'

NOCAPS_DOMAINS = ('in-domain', 'near-domain', 'out-domain')
ENTIRE = 'entire'


@dataclass(frozen=True)
class CaptionScores:
    """Hold the scores of captions, image by image (a `scored.Scored`). All are times 100, as papers report them.

    Attributes:
      cider: CIDEr-D of each image, with the document frequencies of all images of this set.
      rouge: ROUGE-L of each image.
      bleu: what each image adds to BLEU.
      meteor: METEOR of the set and of each image; None: it is left out.
      notes: sentences about what is left out.
    """

    cider: Float[np.ndarray, ' images']
    rouge: Float[np.ndarray, ' images']
    bleu: BleuCounts
    meteor: Meteor | None = None
    notes: tuple[str, ...] = ()

    @property
    def per_item(self) -> Float[np.ndarray, ' images']:
        """Return CIDEr-D of each image as its authors define it: from 0 to 10, and mostly below 2."""
        return self.cider / 100

    def aggregate(self, indices: Int[np.ndarray, ' drawn'] | None = None) -> dict[str, float]:
        """Return the scores of a corpus: BLEU-1 to BLEU-4, ROUGE-L and CIDEr, times 100, and METEOR if it is known.

        BLEU is computed from the summed counts of the images. CIDEr is the mean of values that were computed with the
        document frequencies of the whole set. So for a resample it leaves out that the frequencies vary too, and for a
        real subset, such as a domain, it is not the published figure: call `score_captions` on the subset. METEOR is
        known for the whole set alone, and NaN for others.

        Args:
          indices: the images of the corpus, which may repeat; None means each image once.

        Returns:
          Scores by name.
        """
        # Sums of counts, unlike means of BLEU, give the BLEU of the set.
        rows = slice(None) if indices is None else indices
        values = dict(zip(BLEU_NAMES, self.bleu.corpus(indices).tolist(), strict=True))
        values[ROUGE_NAME] = float(self.rouge[rows].mean())
        values[CIDER_NAME] = float(self.cider[rows].mean())
        if self.meteor is not None:
            # Its program sums statistics that it does not return, so those of a subset are not known.
            values[METEOR_NAME] = self.meteor.corpus if indices is None else math.nan
        return values

    def per_image(self) -> dict[str, Float[np.ndarray, ' images']]:
        """Return the scores of each image, by the names of `aggregate`. BLEU's mean over images is not that of the set.

        Returns:
          One array per score, times 100.
        """
        bleu = dict(zip(BLEU_NAMES, self.bleu.per_image().T, strict=True))
        meteor = {} if self.meteor is None else {METEOR_NAME: self.meteor.per_image}
        return bleu | {ROUGE_NAME: self.rouge, CIDER_NAME: self.cider} | meteor


def score_captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenised: bool = False,
    with_meteor: bool = False,
) -> CaptionScores:
    """Score one caption per image against the reference captions of the image.

    Args:
      predictions: one caption per image.
      references: the reference captions of each image, in the same order. Images may have different numbers of them.
      tokenised: whether the captions are words separated by one space already. `ptb_tokenizer.tokenize` makes them, so
        that the references of several evaluations need to be tokenised once only.
      with_meteor: compute METEOR too if Java and pycocoevalcap are there; otherwise a note says that it is left out.

    Returns:
      The scores of each image, and with `aggregate()` those of the set.

    Raises:
      DataError: there is no image, an image has no reference, or the numbers of images differ.

    >>> scores = score_captions(['A red bus.', 'Two dogs'], [['a red bus', 'A bus!'], ['two dogs play']])
    >>> {name: round(value, 1) for name, value in scores.aggregate().items()}
    {'BLEU-1': 81.9, 'BLEU-2': 81.9, 'BLEU-3': 81.9, 'BLEU-4': 2.6, 'ROUGE-L': 88.6, 'CIDEr': 425.7}
    """
    _check(predictions, references)
    if not tokenised:
        predictions = [tokenize(caption) for caption in predictions]
        references = [[tokenize(caption) for caption in captions] for captions in references]
    scores = CaptionScores(
        cider=cider_d(predictions, references),
        rouge=rouge_l(predictions, references),
        bleu=bleu_counts(predictions, references),
    )
    if not with_meteor:
        return scores
    try:
        return replace(scores, meteor=meteor(predictions, references))
    except MetricError as error:
        # The other scores have taken hours of answers: an optional program must not lose them.
        return replace(scores, notes=(f'METEOR is left out: {error}',))


def score_nocaps(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    domains: Sequence[str],
    *,
    tokenised: bool = False,
    with_meteor: bool = False,
) -> dict[str, CaptionScores]:
    """Score captions of nocaps: each domain by itself, and all images together.

    Each domain is a data set of its own, with its own document frequencies (Agrawal et al., nocaps, ICCV 2019, section
    3.3). So 'entire' is not the mean of the domains.

    Args:
      predictions: one caption per image.
      references: the reference captions of each image, ten in nocaps.
      domains: the domain of each image: 'in-domain', 'near-domain' or 'out-domain'.
      tokenised: as for `score_captions`.
      with_meteor: as for `score_captions`.

    Returns:
      The scores of each domain that has images, in the order above, then those of all images as 'entire'.

    Raises:
      DataError: a domain has another name, or as for `score_captions`.
    """
    _check(predictions, references)
    if len(domains) != len(predictions):
        raise DataError(f'{len(predictions)} images have {len(domains)} domains: give one domain for each image')
    for image, domain in enumerate(domains):
        if domain not in NOCAPS_DOMAINS:
            raise DataError(f'image {image}: unknown domain {domain!r}: expected one of {", ".join(NOCAPS_DOMAINS)}')
    if not tokenised:
        # Once, although each caption is scored twice.
        predictions = [tokenize(caption) for caption in predictions]
        references = [[tokenize(caption) for caption in captions] for captions in references]
    scores = {}
    for domain in NOCAPS_DOMAINS:
        images = [image for image, of_image in enumerate(domains) if of_image == domain]
        if images:
            scores[domain] = score_captions(
                [predictions[image] for image in images],
                [references[image] for image in images],
                tokenised=True,
                with_meteor=with_meteor,
            )
    scores[ENTIRE] = score_captions(predictions, references, tokenised=True, with_meteor=with_meteor)
    return scores


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise an error unless each of one or more images has a prediction and a reference."""
    if len(predictions) != len(references):
        raise DataError(
            f'{len(predictions)} predicted captions for {len(references)} images with references: give one prediction '
            'for each image'
        )
    if not predictions:
        raise DataError('no captions to score: the list of predictions is empty')
    for image, captions in enumerate(references):
        if not captions:
            raise DataError(f'image {image} has no reference caption: leave the image out, or add a caption')
