"""Write a data set of real pictures and captions from the stamps of Tux Paint, which a Debian package holds.

    apt-get download tuxpaint-stamps-default
    dpkg-deb -x tuxpaint-stamps-default_*.deb package
    python benchmarks/stamps.py package OUTPUT [--test_share=0.2] [--seed=0]

A stamp is a picture beside a text file whose first line is its English caption ("A red apple."). The folder of a stamp
says what it is, so questions are made from the folders: "is this an animal?". The stamps are under the GPL (version 2),
so this repository has none.

OUTPUT then holds pictures, and the files that scripts read:

- `data.jsonl`: captions and questions of both splits, to train on (`--config=...:data=OUTPUT`)
- `captions.jsonl`, `questions.jsonl`, `retrieval.jsonl`: the test split as tasks (`launch/evaluate.py --tasks=...`)

Left out and counted are letters of the alphabet, drawings in SVG, pictures without a caption, and the second one of
equal pictures or captions. So no picture and no caption is in both splits. Transparent pixels become white. For each
question there are as many pictures with the answer "yes" as with "no" in each split, so the answers alone tell nothing.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # nothing here runs on a chip, but the package imports JAX
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from PIL import Image

from sparselora_jax.data.caption_forms import clean_caption
from sparselora_jax.data.images import read_image
from sparselora_jax.runtime.errors import DataError, SparseloraError
from sparselora_jax.runtime.files import write_text

STAMPS = 'usr/share/tuxpaint/stamps'  # in the package
ALPHABETS = 'symbols/alphabets'
PICTURES = 'pictures'
CAPTION_QUESTION = 'what is this?'
# Folder -> the question that is answered with yes for its stamps. The answer is no for the stamps of the other folders
# here. Stamps elsewhere are asked nothing: a chocolate egg is in `seasonal`, a fighter in `military`.
QUESTIONS = {
    'animals': 'is this an animal?',
    'clothes': 'is this something to wear?',
    'food': 'is this something to eat?',
    'symbols/money': 'is this money?',
    'town/houses': 'is this a building?',
    'vehicles': 'is this a vehicle?',
}


@dataclass(frozen=True)
class Stamp:
    """A picture with its caption.

    Attributes:
      name: its path below the folder of the stamps.
      caption: the first line of its text file.
      pixels: the picture on white.
    """

    name: PurePosixPath
    caption: str
    pixels: np.ndarray

    @property
    def category(self) -> str:
        """The folder in `QUESTIONS` that it lies in; '' if there is none."""
        return next((folder for folder in QUESTIONS if self.name.is_relative_to(folder)), '')

    @property
    def picture(self) -> str:
        """The name of its picture in the data set."""
        return f'{PICTURES}/{self.name}'


def read_stamps(root: Path, left_out: Counter) -> Iterator[Stamp]:
    """Yield the stamps in the order of their names; count those that are left out, by reason."""
    captions = set()
    pictures = set()
    for path in sorted(root.rglob('*')):
        name = PurePosixPath(path.relative_to(root).as_posix())
        if path.suffix == '.svg':
            left_out['SVG'] += 1
        if path.suffix != '.png':
            continue
        if name.is_relative_to(ALPHABETS):
            left_out['letters'] += 1
            continue
        caption = read_caption(path.with_suffix('.txt'))
        if not clean_caption(caption):
            left_out['without a caption'] += 1
            continue
        pixels = read_image(path)
        digest = sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        # Captions that differ in case or punctuation count as equal.
        if clean_caption(caption) in captions:
            left_out['equal captions'] += 1
        elif digest in pictures:
            left_out['equal pictures'] += 1
        else:
            captions.add(clean_caption(caption))
            pictures.add(digest)
            yield Stamp(name, caption, pixels)


def read_caption(file: Path) -> str:
    """Return the first line of a text file; '' if there is no file.

    Raises:
      DataError: it is not UTF-8.
    """
    if not file.exists():
        return ''
    try:
        # The lines behind the first are translations.
        return (file.read_text(encoding='utf-8-sig').splitlines() or [''])[0].strip()
    except UnicodeDecodeError:
        raise DataError(f'{file}: not UTF-8; unpack the package again') from None


def split_stamps(stamps: list[Stamp], test_share: float, rng: np.random.Generator) -> dict[str, list[Stamp]]:
    """Return the stamps of each split, in their order."""
    test_indices = set(rng.permutation(len(stamps))[: round(test_share * len(stamps))].tolist())
    return {
        'train': [stamp for index, stamp in enumerate(stamps) if index not in test_indices],
        'test': [stamp for index, stamp in enumerate(stamps) if index in test_indices],
    }


def questions_of(stamps: list[Stamp], rng: np.random.Generator) -> list[dict[str, str]]:
    """Return questions about the stamps of one split: for each, as many with yes as with no."""
    records = []
    for folder, question in QUESTIONS.items():
        inside = [stamp for stamp in stamps if stamp.category == folder]
        outside = [stamp for stamp in stamps if stamp.category not in ('', folder)]
        count = min(len(inside), len(outside))
        for answer, candidates in (('yes', inside), ('no', outside)):
            chosen = [candidates[index] for index in sorted(rng.permutation(len(candidates))[:count])]
            records += [{'image': stamp.picture, 'question': question, 'answer': answer} for stamp in chosen]
    return records


def training_records(split: str, stamps: list[Stamp], questions: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the records of one split in the form that recipes read: captions, then questions."""
    asked = [(stamp.picture, CAPTION_QUESTION, stamp.caption) for stamp in stamps]
    asked += [(record['image'], record['question'], record['answer']) for record in questions]
    return [{'image': image, 'prompt': prompt, 'answer': answer, 'split': split} for image, prompt, answer in asked]


def write_tasks(output: Path, stamps: list[Stamp], questions: list[dict[str, str]]) -> None:
    """Write the test split as three tasks."""
    groups = [record | {'metric': 'exact_match', 'groups': {'question': record['question']}} for record in questions]
    write_lines(output / 'questions.jsonl', groups)
    pairs = [{'image': stamp.picture, 'references': [stamp.caption]} for stamp in stamps]
    captions = [pair | {'question': CAPTION_QUESTION, 'metric': 'captions'} for pair in pairs]
    write_lines(output / 'captions.jsonl', captions)
    write_lines(output / 'retrieval.jsonl', [pair | {'metric': 'retrieval'} for pair in pairs])


def write_lines(file: Path, records: list[dict]) -> None:
    """Write a file of JSON lines."""
    write_text(file, ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records))


def write_data(package: Path, output: Path, *, test_share: float, seed: int) -> str:
    """Write the data set, and return a summary.

    Raises:
      DataError: there are no stamps, or the folder to write is not empty.
    """
    root = package / STAMPS
    if not root.is_dir():
        raise DataError(
            f'{root}: no such folder; unpack the package: dpkg-deb -x tuxpaint-stamps-default_*.deb {package}'
        )
    if output.exists() and any(output.iterdir()):
        raise DataError(f'{output}: not empty; name another folder')
    left_out = Counter()
    stamps = list(read_stamps(root, left_out))
    rng = np.random.default_rng(seed)
    splits = split_stamps(stamps, test_share, rng)
    if not all(splits.values()):
        raise DataError(
            f'{root}: {len(stamps)} stamps with captions, too few for two splits at --test_share={test_share}'
        )
    questions = {split: questions_of(members, rng) for split, members in splits.items()}
    for stamp in stamps:
        file = output / stamp.picture
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(stamp.pixels).save(file)
    records = []
    for split, members in splits.items():
        records += training_records(split, members, questions[split])
    write_lines(output / 'data.jsonl', records)
    write_tasks(output, splits['test'], questions['test'])
    counts = ', '.join(f'{count} {reason}' for reason, count in left_out.items())
    return (
        f'{output}: {len(splits["train"])} stamps to train on, {len(splits["test"])} to test with, '
        f'{len(questions["test"])} test questions; left out: {counts or "none"}'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('package', type=Path)
    parser.add_argument('output', type=Path)
    parser.add_argument('--test_share', type=float, default=0.2)
    parser.add_argument('--seed', type=int, default=0)
    arguments = parser.parse_args()
    try:
        print(write_data(arguments.package, arguments.output, test_share=arguments.test_share, seed=arguments.seed))
    except SparseloraError as error:
        raise SystemExit(f'error: {error}') from None


if __name__ == '__main__':
    main()
