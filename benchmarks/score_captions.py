"""Times of scoring captions and retrieval, on data of the size of COCO's test split.

    python benchmarks/score_captions.py [--images=5000] [--captions=captions_val2017.json] [--coco]

One caption per image is scored against five others. Without `--captions`, a file in the form of COCO's annotations, the
captions are made up: ten words each, with the frequencies of a language (Zipf's law). `--coco` also times COCO's own
scorers, and prints how far their scores differ (pip install --no-deps pycocoevalcap==1.2). `ranks` compares every image
with five texts per image.
"""

import argparse
import importlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # nothing here runs on a chip, but the package imports JAX
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from timing import seconds

from sparselora_jax.evaluation.metrics.bleu import bleu_counts
from sparselora_jax.evaluation.metrics.captions import score_captions
from sparselora_jax.evaluation.metrics.cider import cider_d
from sparselora_jax.evaluation.metrics.ptb_tokenizer import tokenize
from sparselora_jax.evaluation.metrics.retrieval import retrieval_ranks
from sparselora_jax.evaluation.metrics.rouge import rouge_l
from sparselora_jax.evaluation.metrics.scored import RESAMPLES, standard_errors

REFERENCES = 5
WORDS = 10  # of a made-up caption
VOCABULARY = 8000
Result = TypeVar('Result')


def timed(name: str, run: Callable[[], Result]) -> Result:
    """Run, print the seconds, and return the result."""
    results = []
    elapsed = seconds(lambda: results.append(run()))
    print(f'{name:32s} {elapsed:8.2f} s')
    return results[0]


def made_up_captions(images: int) -> list[list[str]]:
    """Sentences of random words, six for each image; those of an image share words."""
    generator = np.random.default_rng(0)
    ranks = np.arange(1, VOCABULARY + 1)
    frequencies = 1 / ranks / (1 / ranks).sum()
    groups = []
    for _ in range(images):
        topic = generator.choice(VOCABULARY, size=2 * WORDS, p=frequencies)
        chosen = generator.choice(topic, size=(1 + REFERENCES, WORDS))
        groups.append([' '.join(f'word{_letters(word)}' for word in caption).capitalize() + '.' for caption in chosen])
    return groups


def _letters(number: int) -> str:
    """A number as letters, because digits would take the tokenizer's slow way."""
    return ''.join(chr(ord('a') + int(digit)) for digit in str(number))


def read_captions(file: Path, images: int) -> list[list[str]]:
    """Captions of COCO by image, as in the file; images with fewer than five are left out."""
    groups = defaultdict(list)
    for annotation in json.loads(file.read_text())['annotations']:
        groups[annotation['image_id']].append(annotation['caption'])
    return [captions for captions in groups.values() if len(captions) >= REFERENCES][:images]


def against_coco(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Time COCO's scorers, and print the largest difference of an image's score, in percent points."""
    theirs = dict(enumerate(references)), {image: [caption] for image, caption in enumerate(predictions)}
    ours = score_captions(predictions, references, tokenised=True).per_image()
    for name, module, scorer in (
        ('CIDEr', 'cider.cider', 'Cider'),
        ('BLEU-4', 'bleu.bleu', 'Bleu'),
        ('ROUGE-L', 'rouge.rouge', 'Rouge'),
    ):
        score = getattr(importlib.import_module(f'pycocoevalcap.{module}'), scorer)().compute_score
        _, per_image = timed(f'{name} of pycocoevalcap', lambda score=score: score(*theirs))
        # Of BLEU-1 to BLEU-4, the last.
        difference = np.abs(100 * np.array(per_image[-1] if name == 'BLEU-4' else per_image) - ours[name]).max()
        print(f'  largest difference of an image {difference:.1e}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=5000)
    parser.add_argument('--captions', type=Path)
    parser.add_argument('--coco', action='store_true')
    arguments = parser.parse_args()
    if arguments.captions is None:
        groups = made_up_captions(arguments.images)
    else:
        groups = read_captions(arguments.captions, arguments.images)

    words = timed('tokenise', lambda: [[tokenize(caption) for caption in captions] for captions in groups])
    predictions = [captions[0] for captions in words]
    references = [captions[1:] for captions in words]
    print(f'  {sum(map(len, words))} captions, {len(words)} images')
    timed('CIDEr', lambda: cider_d(predictions, references))
    timed('BLEU', lambda: bleu_counts(predictions, references))
    timed('ROUGE-L', lambda: rouge_l(predictions, references))
    scores = score_captions(predictions, references, tokenised=True)
    timed(f'standard errors, {RESAMPLES} resamples', lambda: standard_errors(scores))
    print('  ' + ', '.join(f'{name} {value:.2f}' for name, value in scores.aggregate().items()))
    if arguments.coco:
        against_coco(predictions, references)

    owner = np.repeat(np.arange(len(words)), REFERENCES)
    similarity = np.random.default_rng(0).normal(size=(len(words), len(owner))).astype(np.float32)
    ranks = timed(f'ranks, {len(words)} x {len(owner)}', lambda: retrieval_ranks(similarity, owner))
    timed(f'standard errors, {RESAMPLES} resamples', lambda: standard_errors(ranks))


if __name__ == '__main__':
    main()
