"""Our figure of each metric beside that of the reference tool, on the same made-up answers.

pip install --no-deps salesforce-lavis==1.0.2 pycocoevalcap==1.2 eccv-caption==0.1.0
python benchmarks/oracles.py [--questions=5000] [--images=1000]

Prints a Markdown table with the value of the whole set, and the largest difference of an item. A tool that is not
installed has no row. METEOR has none: ours is computed by pycocoevalcap's own program.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # nothing here runs on a chip, but the package imports JAX
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))

import answer_pairs
import numpy as np
from score_captions import made_up_captions

from sparselora_jax.evaluation.metrics.captions import score_captions
from sparselora_jax.evaluation.metrics.gqa import gqa_accuracy
from sparselora_jax.evaluation.metrics.ptb_tokenizer import tokenize
from sparselora_jax.evaluation.metrics.retrieval import retrieval_ranks
from sparselora_jax.evaluation.metrics.vqa_accuracy import vqa_accuracy

PERCENT = 100


class Row(NamedTuple):
    """A metric by us and by the reference.

    Attributes:
      metric: its name.
      tool: the reference.
      ours: our value of the whole set.
      theirs: the value of the reference.
      largest: largest difference of an item, or of the values if the tool gives none of items.
    """

    metric: str
    tool: str
    ours: float
    theirs: float
    largest: float


def lavis(questions: int) -> Iterator[Row]:
    """Yield VQA accuracy and GQA accuracy by LAVIS's rules."""
    import lavis_evaluator

    pairs = answer_pairs.pairs(questions, seed=0)
    ours = vqa_accuracy(pairs.predictions, pairs.references, rule='lavis')
    tool = lavis_evaluator.evaluated(pairs)
    theirs = np.array([tool.evalQA[number] for number in range(questions)])
    # LAVIS rounds the score of a question to two digits of a percentage.
    largest = np.abs(np.round(PERCENT * ours.per_item, 2) - theirs).max()
    yield Row('VQA accuracy, rule lavis', 'LAVIS 1.0.2', ours.aggregate()['overall'], tool.accuracy['overall'], largest)
    references = [answers[0] for answers in pairs.references]
    gqa = gqa_accuracy(pairs.predictions, references, rule='lavis')
    normalised = [tool.processDigitArticle(tool.processPunctuation(prediction)) for prediction in pairs.predictions]
    right = np.array([text == reference for text, reference in zip(normalised, references, strict=True)], float)
    largest = PERCENT * np.abs(gqa.per_item - right).max()
    yield Row('GQA accuracy, rule lavis', 'LAVIS 1.0.2', gqa.aggregate()['overall'], PERCENT * right.mean(), largest)


def coco(images: int) -> Iterator[Row]:
    """Yield the metrics of captions by COCO's scorers."""
    groups = [[tokenize(caption) for caption in captions] for captions in made_up_captions(images)]
    predictions = [captions[0] for captions in groups]
    references = [captions[1:] for captions in groups]
    ours = score_captions(predictions, references, tokenised=True)
    theirs = dict(enumerate(references)), {image: [caption] for image, caption in enumerate(predictions)}
    scorers = {'CIDEr': ('cider.cider', 'Cider'), 'BLEU-2': ('bleu.bleu', 'Bleu'), 'ROUGE-L': ('rouge.rouge', 'Rouge')}
    for name, (module, scorer) in scorers.items():
        value, per_image = getattr(importlib.import_module(f'pycocoevalcap.{module}'), scorer)().compute_score(*theirs)
        # Of BLEU-1 to BLEU-4, the second: captions of random words share few longer n-grams.
        if name == 'BLEU-2':
            value = value[1]
            per_image = per_image[1]
        largest = np.abs(PERCENT * np.array(per_image) - ours.per_image()[name]).max()
        yield Row(name, 'pycocoevalcap 1.2', ours.aggregate()[name], PERCENT * float(value), largest)


def eccv() -> Iterator[Row]:
    """Yield the recalls of COCO's 5,000 test images by eccv-caption, on random similarities."""
    metrics = importlib.import_module('eccv_caption').Metrics()
    image_of_text = metrics.coco_gts['t2i']
    image_ids = np.array(sorted(metrics.coco_gts['i2t']))
    text_ids = np.array(sorted(image_of_text))
    row_of_image = {image: row for row, image in enumerate(image_ids)}
    owner = np.array([row_of_image[image_of_text[text][0]] for text in text_ids])
    rng = np.random.default_rng(0)
    features = rng.normal(size=(len(image_ids), 32)).astype(np.float32)
    similarity = features @ (features[owner] + rng.normal(size=(len(text_ids), 32)).astype(np.float32)).T

    def best(rows: np.ndarray, names: np.ndarray, ids: np.ndarray) -> dict[int, list[int]]:
        """Return the ten best ids of each row, in order, by the name of the row."""
        pairs = zip(names, rows, strict=True)
        return {int(name): ids[np.argsort(-row, kind='stable')[:10]].tolist() for name, row in pairs}

    retrieved = {
        'i2t': best(similarity, image_ids, text_ids),
        't2i': best(np.ascontiguousarray(similarity.T), text_ids, image_ids),
    }
    recalls = retrieval_ranks(similarity, owner).aggregate()
    theirs = metrics.coco_5k_recalls(retrieved, 'all', K=1)
    for ours, name in (('txt_r1', 'i2t'), ('img_r1', 't2i')):
        difference = abs(recalls[ours] - PERCENT * theirs[name])
        yield Row(f'{ours}, COCO 5K', 'eccv-caption 0.1.0', recalls[ours], PERCENT * theirs[name], difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--questions', type=int, default=5000)
    parser.add_argument('--images', type=int, default=1000)
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        'lavis': lambda: lavis(arguments.questions),
        'pycocoevalcap': lambda: coco(arguments.images),
        'eccv_caption': eccv,
    }
    print('| metric | reference | ours | theirs | largest difference of an item |')
    print('|---|---|---|---|---|')
    for package, rows in parts.items():
        if importlib.util.find_spec(package) is None:
            print(f'{package} is not installed', file=sys.stderr)
            continue
        # The tools print their progress.
        with contextlib.redirect_stdout(sys.stderr):
            known = list(rows())
        for row in known:
            cells = [row.metric, row.tool, f'{row.ours:.4f}', f'{row.theirs:.4f}', f'{row.largest:.1e}']
            print('| ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main()
