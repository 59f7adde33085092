"""What indexing the annotations of VQAv2's validation split costs: 214,354 questions over 40,504 images.

python benchmarks/index_annotations.py [--folder=/some/disk] [--scale=1.0]

Files of the same counts, keys and about the same bytes are made up and deleted afterwards; the images are empty files.
Each step runs in a process of its own:

- `json.load`: both files are decoded as wholes, which is the least that evaluation code in Python usually does
- `index`: `load('vqav2_val', folder)`: files found and recognised, questions joined with answers, images found
- `first batch`: 64 items of the indexed benchmark, with 64 images of 640 x 480 pixels read and decoded

Memory is the peak of the process beyond what it had before the step.

Two CPU cores: `json.load` 3.9 s and 1,112 MB, `index` 7.2 s and 154 MB, `first batch` 0.2 s. Two slow ones, shared with
other jobs: 24.1 s, 42.1 s and 1.1 s.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

QUESTIONS, IMAGES = 214_354, 40_504
BATCH = 64
QUESTION_FILE = 'v2_OpenEnded_mscoco_val2014_questions.json'
ANNOTATION_FILE = 'v2_mscoco_val2014_annotations.json'
SUBJECTS = ('the man', 'the woman', 'this dog', 'the small plane', 'the table', 'a building', 'the train', 'the boy')
VERBS = ('holding', 'wearing', 'looking at', 'standing near', 'playing with', 'next to', 'behind', 'made of')
PREFIXES = (
    'what is',
    'what color is',
    'how many',
    'is the',
    'is this',
    'what kind of',
    'where is',
    'none of the above',
)


def write(folder: Path, scale: float) -> tuple[int, int]:
    """Write both files and the folder of images.

    Args:
      folder: where to write them.
      scale: share of the questions and images.

    Returns:
      (number of questions, bytes of both files).
    """
    images = int(IMAGES * scale)
    questions = int(QUESTIONS * scale)
    rows = []
    annotations = []
    for number in range(questions):
        image_id = 42 + 14 * (number % images)
        question_id = image_id * 1000 + number // images
        prefix = PREFIXES[number % len(PREFIXES)]
        words = f'{SUBJECTS[number % 7]} {VERBS[number // 7 % 8]} in picture {number % 90_001}'
        # Most answers are frequent ones, and one in forty occurs nowhere else.
        answers = [f'answer {(number * 7 + place * place) % 3000}' for place in range(10)]
        answers[9] = f'rare answer {number}' if number % 40 == 0 else answers[0]
        rows.append({'image_id': image_id, 'question': f'{prefix.capitalize()} {words}?', 'question_id': question_id})
        annotations.append(
            {
                'question_type': prefix,
                'multiple_choice_answer': answers[0],
                'answers': [
                    {'answer': answer, 'answer_confidence': 'yes', 'answer_id': rank}
                    for rank, answer in enumerate(answers, start=1)
                ],
                'image_id': image_id,
                'answer_type': ('yes/no', 'number', 'other')[number % 3],
                'question_id': question_id,
            }
        )
    head = {'info': {'year': 2017}, 'license': {}, 'data_type': 'mscoco', 'data_subtype': 'val2014'}
    for name, body in (
        (QUESTION_FILE, {'task_type': 'Open-Ended', 'questions': rows}),
        (ANNOTATION_FILE, {'annotations': annotations}),
    ):
        with (folder / name).open('w') as file:
            json.dump(head | body, file)
    (folder / 'val2014').mkdir()
    for number in range(images):
        (folder / 'val2014' / f'COCO_val2014_{42 + 14 * number:012d}.jpg').touch()
    return questions, sum((folder / name).stat().st_size for name in (QUESTION_FILE, ANNOTATION_FILE))


def fill_images(folder: Path) -> None:
    """Replace the images of the first batch by photographs' worth of noise."""
    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    photograph = folder / 'photograph.jpeg'
    Image.fromarray(coarse).resize((640, 480)).save(photograph, quality=90)
    for number in range(BATCH):
        shutil.copy(photograph, folder / 'val2014' / f'COCO_val2014_{42 + 14 * number:012d}.jpg')
    photograph.unlink()


def peak() -> int:
    """Return the peak memory of this process, in bytes."""
    # Not `getrusage`, whose figure a new process takes over from the one that starts it.
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('VmHWM'))


def decode(folder: Path) -> dict[str, float]:
    """Decode both files as wholes."""
    before = peak()
    start = time.perf_counter()
    decoded = [json.loads((folder / name).read_bytes()) for name in (QUESTION_FILE, ANNOTATION_FILE)]
    return {'seconds': time.perf_counter() - start, 'bytes': peak() - before, 'items': len(decoded[0]['questions'])}


def index(folder: Path) -> dict[str, float]:
    """Index the benchmark, then read its first batch."""
    from sparselora_jax.data.benchmarks.load import load

    before = peak()
    start = time.perf_counter()
    items = load('vqav2_val', folder)
    seconds = time.perf_counter() - start
    memory = peak() - before
    start = time.perf_counter()
    batch = [(item.question, item.references, item.image.read()) for item in map(items.__getitem__, range(BATCH))]
    batch_seconds = time.perf_counter() - start
    assert all(pixels.shape == (480, 640, 3) for _, _, pixels in batch)
    return {
        'seconds': seconds,
        'bytes': memory,
        'items': len(items),
        'column bytes': items.nbytes,
        'batch seconds': batch_seconds,
    }


STEPS = {'decode': decode, 'index': index}


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Run each step in a process of its own, which shares no memory with the others."""
    results = {}
    for step in STEPS:
        command = [sys.executable, __file__, f'--folder={folder}', f'--step={step}']
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        results[step] = json.loads(output)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', help='where to make up the files')
    parser.add_argument('--scale', type=float, default=1.0, help='share of the questions and images')
    parser.add_argument('--step', choices=STEPS, help='measure this step in this process; for the script itself')
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(STEPS[arguments.step](Path(arguments.folder))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        questions, size = write(folder, arguments.scale)
        fill_images(folder)
        print(f'{questions:,} questions, {size / 1e6:.0f} MB of JSON')
        results = measure(folder)
    decoded = results['decode']
    indexed = results['index']
    ratio = indexed['seconds'] / decoded['seconds']
    print(f'json.load   {decoded["seconds"]:6.1f} s  {decoded["bytes"] / 1e6:6.0f} MB')
    print(f'index       {indexed["seconds"]:6.1f} s  {indexed["bytes"] / 1e6:6.0f} MB  {ratio:.2f} of json.load')
    print(f'first batch {indexed["batch seconds"]:6.1f} s  {BATCH} items')


if __name__ == '__main__':
    main()
