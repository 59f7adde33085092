"""Accuracy of a model on visual questions: easy-VQA's, or those of a folder.

python launch/evaluate.py --model=runs/demo/exported [--questions=1000] [--data=FOLDER] [--shuffle_images]
"""

import json
from pathlib import Path

import cli
from absl import flags

from sparselora_jax.data import find_loader, pipeline
from sparselora_jax.data.dataset import DataRequest
from sparselora_jax.evaluation import vqa
from sparselora_jax.runtime.progress import Progress

cli.define_model()
QUESTIONS = flags.DEFINE_integer('questions', 1000, 'how many of the test questions', lower_bound=1)
BATCH = flags.DEFINE_integer('batch', 50, 'questions at a time', lower_bound=1)
SEED = flags.DEFINE_integer('seed', 42, 'which ones')
SHUFFLE = flags.DEFINE_bool('shuffle_images', False, "give each question another question's image")
DATA = flags.DEFINE_string('data', 'easy_vqa', 'easy_vqa, or a folder with a data.jsonl')
DATA_DIR = flags.DEFINE_string('data_dir', 'runs/data', 'where easy-VQA is prepared')


def main(argv):
    """Prints accuracy, and the floor of a model that never sees an image."""
    del argv
    model, params, processor, text = cli.load_model()
    misfit = pipeline.misfit(processor, text, answers=False)
    dataset = find_loader(DATA.value)(DataRequest(DATA.value, Path(DATA_DIR.value), misfit))
    train, test = (split.read_texts() for split in (dataset.train, dataset.test))
    indices = vqa.sample(QUESTIONS.value, len(test), seed=SEED.value)
    answers = vqa.evaluate(
        model,
        params,
        processor,
        text,
        dataset.test,
        indices,
        batch=BATCH.value,
        shuffle_images=SHUFFLE.value,
        progress=Progress('evaluate', len(indices)),
        **text.decoding,
    )
    floor = vqa.blind_floor(train, [test[index] for index in indices])
    scores = {'accuracy': answers, 'image_blind_floor': floor}
    print(json.dumps({name: found.accuracy(dataset.kind_of) for name, found in scores.items()}, indent=1))


if __name__ == '__main__':
    cli.run(main)
