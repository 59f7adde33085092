"""How fast the input of an evaluation on tasks is, compared with the evaluation that consumes it.

python benchmarks/task_input.py [--items=200] [--batch=50] [--model=DIR]

Photographs of 640 x 480 pixels are made up, with a question for each, as a folder with a `data.jsonl`. Without
`--model`, the embedded model answers, greedily, as it does in `make demo`.

- `read`: images are read and decoded, in one thread
- `prepare`: images are resized and normalised, and prompts are tokenised, in one thread
- `input, 1 thread`: both, one after the other
- `input`: both, in the threads of an evaluation
- `evaluate`: `vqa.evaluate` reads, prepares and answers

The goal is that `input` is 20 times `evaluate`. Each is the best of three rounds, after one that compiles the program.
The last line compares CPU seconds instead, which other jobs of the machine change less.
"""

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import json

import numpy as np
from PIL import Image
from timing import in_turn

from sparselora_jax.data.benchmarks.load import load_user_file
from sparselora_jax.evaluation import task_runs
from sparselora_jax.jobs import evaluate_tasks
from sparselora_jax.jobs.evaluate_tasks import TaskRequest
from sparselora_jax.runtime.ahead import READING_THREADS, map_ahead

GOAL = 20
ROUNDS = 3  # of each measurement
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


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU seconds of one call, over all threads."""
    started = time.process_time()
    run()
    return time.process_time() - started


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
        indices = range(len(items))
        images = [items[index].image.read() for index in indices]
        text = task.asked.text

        def prepare(image: np.ndarray, index: int) -> None:
            processor.example(image, task.prompts[index], prompt_tokens=text.prompt_tokens, answer_tokens=1)

        def read_and_prepare(index: int) -> None:
            prepare(items[index].image.read(), index)

        def feed(threads: int) -> None:
            for _ in map_ahead(read_and_prepare, indices, ahead=arguments.batch, threads=threads):
                pass

        def evaluate() -> None:
            answers_file = folder / 'answers.jsonl'
            answers_file.unlink(missing_ok=True)  # an evaluation goes on after the answers that it finds
            task_runs.ask(
                model,
                params,
                processor,
                task.items,
                task.asked,
                batch=arguments.batch,
                answers_file=answers_file,
                owner='',
            )

        steps = {
            'read': lambda: [items[index].image.read() for index in indices],
            'prepare': lambda: [prepare(images[index], index) for index in indices],
            'input, 1 thread': lambda: feed(1),
            'input': lambda: feed(READING_THREADS),
            'evaluate': evaluate,
        }
        # In turn, so that a busy machine slows all of them.
        elapsed = {name: min(rounds) for name, rounds in in_turn(steps, ROUNDS).items()}
        cpu = {name: cpu_seconds(steps[name]) for name in ('input', 'evaluate')}
    for name, taken in elapsed.items():
        print(f'{name:15} {arguments.items / taken:8.1f} items a second')
    print(f'input / evaluate: {elapsed["evaluate"] / elapsed["input"]:.1f} (goal {GOAL}), {READING_THREADS} threads')
    print(f'in CPU seconds: {cpu["evaluate"] / cpu["input"]:.1f}')


if __name__ == '__main__':
    main()
