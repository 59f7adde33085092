"""Answers one question about one image.

python launch/generate.py IMAGE "what color is the shape?" [--model=runs/demo/exported/model.safetensors]
"""

import cli
import numpy as np
from absl import flags

from sparselora_jax.data import pipeline
from sparselora_jax.evaluation import vqa
from sparselora_jax.export import load_model, load_text_format
from sparselora_jax.models import embedded

MODEL = flags.DEFINE_string('model', None, 'a model.safetensors of an export; by default the embedded dense model')


def main(argv):
    """Prints the answer."""
    if len(argv) != 2:
        raise pipeline.DataError('expected two arguments: IMAGE "question"')
    path, question = argv
    if not question.strip():
        raise pipeline.DataError('the question is empty')
    pipeline.read_image(path, 1)  # what is no image is named before the model is loaded
    text = load_text_format(MODEL.value or embedded.BRIDGE)
    cfg, params = embedded.load() if MODEL.value is None else load_model(MODEL.value)
    tokenizer = embedded.load_tokenizer()
    pixels = pipeline.read_image(path, cfg.vision.image_size)
    example = pipeline.encode(tokenizer, text, question) | {'image': pipeline.normalise(pixels)}
    batch = {name: np.asarray(example[name])[None] for name in ('image', 'tokens', 'valid')}
    print(vqa.generate_answers(params, cfg, batch, tokenizer, prompt_tokens=text.prompt_tokens)[0])


if __name__ == '__main__':
    cli.run(main)
