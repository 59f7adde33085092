"""Accuracy of a model on the easy-VQA test questions.

python launch/evaluate.py --model=runs/demo/exported/model.safetensors [--questions=1000] [--shuffle_images]
"""

import json

import cli
from absl import flags

from sparselora_jax.data import easy_vqa, pipeline
from sparselora_jax.evaluation import vqa
from sparselora_jax.export import load_model, load_text_format
from sparselora_jax.models import embedded
from sparselora_jax.progress import Progress

MODEL = flags.DEFINE_string('model', None, 'a model.safetensors of an export; by default the embedded dense model')
QUESTIONS = flags.DEFINE_integer('questions', 1000, 'how many of the 9,673')
SEED = flags.DEFINE_integer('seed', 42, 'which ones')
SHUFFLE = flags.DEFINE_bool('shuffle_images', False, "give each question another question's image")
DATA = flags.DEFINE_string('data_dir', 'runs/data', 'where the data set is prepared')


def main(argv):
    """Prints accuracy, and the floor of a model that never sees an image."""
    del argv
    cfg, params = embedded.load() if MODEL.value is None else load_model(MODEL.value)
    tokenizer, text = embedded.load_tokenizer(), load_text_format(MODEL.value or embedded.BRIDGE)
    builder = easy_vqa.prepare(DATA.value)
    test = pipeline.read_texts(builder, 'test')
    indices = vqa.sample(QUESTIONS.value, len(test), seed=SEED.value)
    source, progress = builder.as_data_source('test'), Progress('evaluate', len(indices))
    shuffle = SHUFFLE.value
    answers = vqa.evaluate(params, cfg, source, indices, tokenizer, text, shuffle_images=shuffle, progress=progress)
    floor = vqa.blind_floor(pipeline.read_texts(builder, 'train'), [test[index] for index in indices])
    print(json.dumps({'accuracy': answers.accuracy(), 'image_blind_floor': floor.accuracy()}, indent=1))


if __name__ == '__main__':
    cli.run(main)
