"""How fast the input of an evaluation on tasks is, compared with the evaluation that consumes it.

python benchmarks/task_input.py [--items=200] [--batch=50] [--model=DIR]

Photographs of 640 x 480 pixels are made up, with a question for each, as a folder with a `data.jsonl`. Without
`--model`, the embedded model answers, greedily, as it does in `make demo`.

- `read`: images are read and decoded
- `prepare`: images are resized and normalised, and prompts are tokenised
- `evaluate`: `vqa.evaluate` reads, prepares and answers, after a batch that compiles the program

`input` is what reading and preparing reach together, one after the other in one thread. The goal is 20 times the rate
of `evaluate`.
"""

import argparse
import io
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import json

import numpy as np
from PIL import Image
from timing import seconds

from sparselora_jax.data.benchmarks.load import load_user_file
from sparselora_jax.evaluation import task_runs
from sparselora_jax.jobs import evaluate_tasks
from sparselora_jax.jobs.evaluate_tasks import TaskRequest

GOAL = 20
SIZE = (640, 480)  # of a photograph of COCO, in pixels


def photograph(seed: int) -> bytes:
    """Return a JPEG file of about the size of a photograph's: noise at several scales."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((SIZE[1], SIZE[0], 3))
    for scale in (4, 16, 64):
        coarse = rng.integers(0, 256, (SIZE[1] // scale, SIZE[0] // scale, 3), np.uint8)
        pixels += np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)) / 3
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, 'JPEG', quality=90)
    return file.getvalue()


def write(folder: Path, items: int) -> None:
    """Write the photographs and their questions."""
    lines = []
    for number in range(items):
        (folder / f'{number}.jpg').write_bytes(photograph(number))
        question = f'What is the person on the {number % 7} th bench doing?'
        lines.append({'image': f'{number}.jpg', 'question': question, 'references': ['sitting']})
    (folder / 'data.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def load(model: str | None) -> tuple:
    """Return a model, its weights and its processor."""
    from sparselora_jax.checkpoints import embedded
    from sparselora_jax.checkpoints.load import load_model, load_processor

    if model is None:
        known, params = embedded.load(dtype='float32')
        return known, params, embedded.load_processor(known.cfg)
    return *load_model(model), load_processor(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--items', type=int, default=200)
    parser.add_argument('--batch', type=int, default=50)
    parser.add_argument('--model', help='a directory; default: the embedded model')
    arguments = parser.parse_args()
    model, params, processor = load(arguments.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, arguments.items)
        size = (folder / '0.jpg').stat().st_size
        print(f'{arguments.items} photographs of {SIZE[0]} x {SIZE[1]}, {size / 1e3:.0f} kB each')
        decoding = {'num_beams': 1, 'max_new_tokens': 4}
        request = TaskRequest((str(folder),), None, batch=arguments.batch, overrides=decoding)
        loaded = evaluate_tasks.load_tasks(request)
        (task,) = evaluate_tasks.prepare(request, loaded, model, processor).values()
        items = load_user_file(folder / 'data.jsonl')
        images = []
        reading = seconds(lambda: images.extend(items[index].image.read() for index in range(len(items))))
        text = task.asked.text

        def prepare() -> None:
            for image, prompt in zip(images, task.prompts, strict=True):
                processor.example(image, prompt, prompt_tokens=text.prompt_tokens, answer_tokens=1)

        preparing = seconds(prepare)

        def evaluate(count: int, file: str) -> None:
            task_runs.ask(
                model,
                params,
                processor,
                task.items.take(range(count)),
                task.asked,
                batch=arguments.batch,
                answers_file=folder / file,
                owner='',
            )

        evaluate(arguments.batch, 'compiled.jsonl')
        evaluating = seconds(lambda: evaluate(arguments.items, 'answers.jsonl'))
    rates = {'read': reading, 'prepare': preparing, 'input': reading + preparing, 'evaluate': evaluating}
    for step, elapsed in rates.items():
        print(f'{step:9} {arguments.items / elapsed:8.1f} items a second')
    print(f'input / evaluate: {evaluating / (reading + preparing):.1f} (goal {GOAL})')


if __name__ == '__main__':
    main()
