"""What a search among images and texts costs, and how many programs it compiles, on a tiny model.

    python benchmarks/retrieval.py [--images=1000] [--texts=5] [--candidates=128] [--batch=64]

Images and captions are made up; there are so many captions for each image. The model has the shape of BLIP-2's
retrieval model, with two layers and random weights, so the time says what the search adds to a model and nothing about
a large one. `stopped` is the same search, begun with a file of which the last tenth is cut off, as a kill leaves it.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from memory import PeakMemory
from timing import seconds

from sparselora_jax.data.benchmarks.items import Items, ItemsBuilder
from sparselora_jax.data.processing import Inputs
from sparselora_jax.evaluation import retrieval
from sparselora_jax.evaluation.metrics.retrieval import retrieval_ranks
from sparselora_jax.models import blip2_retrieval, qformer, vit
from sparselora_jax.models.init import init_params
from sparselora_jax.models.model import Generation, Model

SIDE = 28  # pixels of an image
VOCABULARY = 1000
WORDS = 10  # of a caption
CONFIG = blip2_retrieval.Blip2RetrievalConfig(
    vision=vit.ViTConfig(image_size=SIDE, patch_size=14, width=32, depth=2, heads=4, mlp_width=64),
    qformer=qformer.QFormerConfig(
        queries=4, width=32, pairs=1, heads=4, mlp_width=64, image_width=32, vocab=VOCABULARY, max_positions=40
    ),
    embedding_width=16,
)


@dataclass(frozen=True)
class MadeUpPicture:
    """An image of random pixels."""

    name: str

    def read(self) -> np.ndarray:
        return np.random.default_rng(int(self.name)).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


class MadeUpProcessor:
    """Turns a caption into the numbers that it consists of, and an image into its pixels."""

    def read_images(self, images: list[np.ndarray]) -> Inputs:
        return {'pixel_values': (np.stack(images).transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)}

    def read_texts(self, texts: list[str], length: int) -> Inputs:
        tokens = np.zeros((len(texts), length), np.int32)
        for row, text in enumerate(texts):
            words = [int(word) for word in text.split()]
            tokens[row, : len(words)] = words
        return {'input_ids': tokens, 'attention_mask': (tokens > 0).astype(np.int32)}


def made_up_items(images: int, texts: int) -> Items:
    """Images, each with so many captions."""
    rng = np.random.default_rng(0)
    builder = ItemsBuilder('made up')
    for image in range(images):
        captions = [' '.join(map(str, rng.integers(1, VOCABULARY, WORDS))) for _ in range(texts)]
        builder.add(image, builder.image_file(str(image), image), references=captions)
    return builder.build([MadeUpPicture(name) for name in builder.image_names])


def programs() -> dict[str, int]:
    """Return the number of compiled versions of each program of a search."""
    names = ('_features', '_image_embeddings', '_text_embeddings', '_similarities', '_match')
    return {name.strip('_'): getattr(retrieval, name)._cache_size() for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (('images', 1000), ('texts', 5), ('candidates', 128), ('batch', 64)):
        parser.add_argument(f'--{name}', type=int, default=default)
    arguments = parser.parse_args()
    model = Model(CONFIG, Generation(eos=(), pad=0))
    params = init_params(jax.random.key(0), CONFIG.family.shapes(CONFIG))
    items = made_up_items(arguments.images, arguments.texts)
    asked = CONFIG.family.task_format(CONFIG, 'retrieval')
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'answers.jsonl'

        def search() -> retrieval.Search:
            return retrieval.search(
                model,
                params,
                MadeUpProcessor(),
                items,
                asked,
                batch=arguments.batch,
                answers_file=file,
                owner='benchmark',
                candidates=arguments.candidates,
            )

        results = []
        memory = PeakMemory()
        whole = seconds(lambda: results.append(search()))
        peak = memory.peak()
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b''.join(lines[: len(lines) * 9 // 10]))
        stopped = seconds(lambda: results.append(search()))
        size = file.stat().st_size
    first, again = results
    same = np.array_equal(first.of_images, again.of_images) and np.array_equal(first.of_texts, again.of_texts)
    pairs = int((np.isfinite(first.of_images) | np.isfinite(first.of_texts.T)).sum())
    print(f'{arguments.images} images x {len(first.texts)} texts, {arguments.candidates} candidates: {pairs:,} pairs')
    print(f'whole search  {whole:8.1f} s, {pairs / whole:,.0f} pairs a second, peak {peak / 2**20:,.0f} MiB')
    print(f'stopped at 90 % {stopped:6.1f} s for the rest; the same scores: {same}; file {size / 2**20:.1f} MiB')
    print('compiled: ' + ', '.join(f'{name} {count}' for name, count in programs().items()))
    ranks = retrieval_ranks(first.of_images, first.image_of_text, text_similarity=first.of_texts)
    print(', '.join(f'{name} {value:.2f}' for name, value in ranks.aggregate().items() if name.endswith('_r1')))


if __name__ == '__main__':
    main()
