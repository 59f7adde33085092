"""What the input pipeline costs on tar shards: index, draw, and batches of images with their captions.

python benchmarks/input.py [--folder=/some/disk] [--shards=20] [--samples=1000] [--batch=32]

Shards with as many samples as img2dataset writes are made up and deleted afterwards: JPEG files of 512 x 384 pixels
with the noise of a photograph, a caption, and a JSON of fields. Measured are

- `index`: the headers of all shards are read; then again from the index that was kept
- `draw`: 2,500 records are drawn and their images opened
- `read`: images of the shards, of files in folders and of a parquet file are read and decoded, in random order
- `batches`: batches by step, with and without crops, as a run reads them (without a model's processor)
- `resume`: the first batch of a new pipeline at step 10,000
"""

import argparse
import io
import json
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sparselora_jax.data import pipeline
from sparselora_jax.data.augment import crop_and_flip
from sparselora_jax.data.dataset import DataRequest, Dataset, Mixture
from sparselora_jax.data.mixture import MixtureLoader
from sparselora_jax.data.sources.catalog import open_source
from sparselora_jax.data.sources.place import SourceName

DIFFERENT_IMAGES = 64  # images that are made; samples repeat them
DRAWN = 2500
READ = 500  # images that are read one by one
ROW_GROUP = 100  # rows of a row group in data sets with images, as Hugging Face writes them
STEPS = 20


def write(folder: Path, shards: int, samples: int) -> int:
    """Write the shards, a folder of files and a parquet file, and return the bytes of the shards.

    Args:
      folder: where to write them.
      shards: number of tar files.
      samples: number of samples in each.
    """
    rng = np.random.default_rng(0)
    images = []
    for _ in range(DIFFERENT_IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).resize(
            (512, 384), Image.Resampling.BICUBIC
        )
        file = io.BytesIO()
        coarse.save(file, 'JPEG', quality=90)
        images.append(file.getvalue())
    (folder / 'shards').mkdir()
    for shard in range(shards):
        with tarfile.open(folder / 'shards' / f'{shard:05d}.tar', 'w') as archive:
            for sample in range(samples):
                key = f'{shard:05d}{sample:04d}'
                caption = f'a river has burst its banks near picture {key}'
                fields = {'caption': caption, 'key': key, 'status': 'success', 'width': 512, 'height': 384}
                members = {
                    'jpg': images[(shard * samples + sample) % DIFFERENT_IMAGES],
                    'txt': caption.encode(),
                    'json': json.dumps(fields).encode(),
                }
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f'{key}.{suffix}')
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    (folder / 'files').mkdir()
    for number in range(DRAWN):
        (folder / 'files' / f'{number:06d}.jpg').write_bytes(images[number % DIFFERENT_IMAGES])
        (folder / 'files' / f'{number:06d}.txt').write_text(f'a river has burst its banks near picture {number}')
    (folder / 'parquet').mkdir()
    pairs = {
        'image': [{'bytes': images[number % DIFFERENT_IMAGES], 'path': f'{number}.jpg'} for number in range(DRAWN)],
        'caption': [f'a river has burst its banks near picture {number}' for number in range(DRAWN)],
    }
    pq.write_table(pa.table(pairs), folder / 'parquet' / 'train.parquet', row_group_size=ROW_GROUP)
    return sum(path.stat().st_size for path in (folder / 'shards').iterdir())


def load(folder: Path, name: str, samples: int) -> Dataset:
    """Return the data set of one of the folders."""
    return MixtureLoader()(DataRequest(str(folder / name), folder / 'kept', mixture=Mixture(samples=samples)))


def seconds(do: Callable[[], object]) -> float:
    """Return how long a function takes."""
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def batches(dataset: Dataset, batch: int, *, is_augmented: bool):
    """Return batches of resized images, as a run reads them."""

    def transform(record):
        pixels = Image.fromarray(record['image']).resize((224, 224), Image.Resampling.BICUBIC)
        return {'pixel_values': np.asarray(pixels)}

    return pipeline.batches(
        dataset.train.source,
        transform,
        batch=batch,
        seed=0,
        groups=[range(len(dataset.train.source))],
        shares=(1,),
        augment_image=crop_and_flip if is_augmented else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', help='where to make up the files')
    parser.add_argument('--shards', type=int, default=20)
    parser.add_argument('--samples', type=int, default=1000, help='samples of a shard')
    parser.add_argument('--batch', type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        size = write(folder, arguments.shards, arguments.samples)
        count = arguments.shards * arguments.samples
        print(f'{arguments.shards} shards, {count:,} samples, {size / 1e6:,.0f} MB')
        shards = SourceName(str(folder / 'shards'))
        source = open_source(shards, index_dir=folder / 'kept')
        first = seconds(lambda: open_source(shards, index_dir=folder / 'kept'))
        source.keep_index()
        again = seconds(lambda: open_source(shards, index_dir=folder / 'kept'))
        print(f'index    {first:6.2f} s ({count / first:,.0f} samples/s); kept index {again:.2f} s')
        drawn = {}
        for kind in ('shards', 'files', 'parquet'):
            spent = seconds(lambda kind=kind: drawn.update({kind: load(folder, kind, DRAWN)}))
            print(f'draw     {spent:6.2f} s for {DRAWN:,} records of {kind}')
        order = np.random.default_rng(0).permutation(len(drawn['files'].train.source))[:READ]
        for kind, dataset in drawn.items():
            spent = seconds(lambda dataset=dataset: [dataset.train.source[index] for index in order])
            print(f'read     {READ / spent:6.0f} records/s from {kind}')
        for is_augmented in (False, True):
            data = batches(drawn['shards'], arguments.batch, is_augmented=is_augmented)
            spent = seconds(lambda data=data: [data[step] for step in range(STEPS)])
            rate = STEPS * arguments.batch / spent
            print(f'batches  {rate:6.0f} records/s by one thread{", with crops" if is_augmented else ""}')
        fresh = batches(drawn['shards'], arguments.batch, is_augmented=True)
        print(f'resume   {seconds(lambda: fresh[10_000]):6.2f} s for the batch of step 10,000')
        shutil.rmtree(folder / 'kept')


if __name__ == '__main__':
    main()
