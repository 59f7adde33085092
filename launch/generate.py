"""Answer one question about one image.

python launch/generate.py IMAGE "what color is the shape?" [--model=runs/demo/exported] [--num_beams=5]
"""

import cli

from sparselora_jax.data import images
from sparselora_jax.evaluation import vqa
from sparselora_jax.runtime.errors import DataError

cli.define_model()


def main(argv: list[str]) -> None:
    """Print the answer to `argv`: an image and a question."""
    if len(argv) != 2:
        raise DataError('expected two arguments: IMAGE "question"')
    path, question = argv
    if not question.strip():
        raise DataError('the question is empty')
    # Read before the model is loaded, so that a bad image file is refused at once.
    image = images.read_image(path)
    loaded = cli.load_model()
    cli.check_memory(loaded, 1)
    cli.print_header()
    model, params, processor, text = loaded
    (answer,) = vqa.generate_answers(model, params, processor, text, [image], [question], **text.decoding)
    print(answer)


if __name__ == '__main__':
    cli.run(main, 'IMAGE QUESTION')
