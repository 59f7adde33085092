"""Compute METEOR with the Java program that the package pycocoevalcap contains."""

import importlib
import importlib.util
import shutil
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sparselora_jax.evaluation.metric import MetricError
from sparselora_jax.runtime.errors import DataError, calling

PERCENT = 100.0
INSTALL = 'pip install --no-deps pycocoevalcap==1.2'
# What separates texts in the lines that the program reads.
_SEPARATORS = ('|||', '\n')


class Meteor(NamedTuple):
    """Hold METEOR times 100: of all images together, and of each image."""

    corpus: float
    per_image: Float[np.ndarray, ' images']


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Meteor:
    """Return METEOR 1.5 for English, as COCO's evaluation code computes it (Denkowski and Lavie, WMT 2014).

    METEOR also matches stems, synonyms and paraphrases, from tables of 60 MB. So it comes from the package
    pycocoevalcap, which runs a Java program with up to 2 GB of memory.

    Args:
      predictions: one caption per image, as words separated by spaces (`ptb_tokenizer.tokenize`).
      references: the reference captions of each image, likewise. Each image has at least one.

    Returns:
      The score of the corpus, which is computed from the summed statistics of the images and is not the mean of their
      scores, and the scores of the images.

    Raises:
      MetricError: Java or pycocoevalcap is not installed, or the program fails.
      DataError: a caption has a line feed or '|||'.
    """
    if shutil.which('java') is None:
        raise MetricError(
            'METEOR needs Java, and there is no program java: install a Java runtime, such as default-jre-headless'
        )
    if importlib.util.find_spec('pycocoevalcap') is None:
        raise MetricError(f'METEOR needs the package pycocoevalcap, which is not installed; run: {INSTALL}')
    for image, captions in enumerate(references):
        for caption in (predictions[image], *captions):
            if any(separator in caption for separator in _SEPARATORS):
                raise DataError(f'image {image}: METEOR cannot score {caption!r}: tokenise it first')
    with calling('METEOR', MetricError):
        # By name, because the package is optional and no extra of this one installs it.
        scorer = importlib.import_module('pycocoevalcap.meteor.meteor').Meteor()
        corpus, per_image = scorer.compute_score(
            {image: list(captions) for image, captions in enumerate(references)},
            {image: [prediction] for image, prediction in enumerate(predictions)},
        )
    return Meteor(PERCENT * corpus, PERCENT * np.array(per_image, np.float64))
