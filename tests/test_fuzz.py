"""Whatever is altered in a file, its reader returns a value or raises an error of ours, and never hangs."""

import functools
import json
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fuzz import alter, alter_exif, alter_header, alter_json
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save

import sparselora_jax as sl
from sparselora_jax.checkpoints import checkpoint_files, safetensors_format, trees
from sparselora_jax.data import images, text_format
from sparselora_jax.data.folder import read_folder
from sparselora_jax.restoration.saved_state import MANIFEST, CheckpointError, Checkpoints
from sparselora_jax.runtime import digests
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.sparse import packing

SECONDS = 60  # for all alterations of one kind
FEW, MANY = 40, 2000


def exif():
    """EXIF data with tags of every type, and with the folders of GPS and camera."""
    tags = Image.Exif()
    tags.update({0x0112: 6, 0x010F: 'maker', 0x011A: 72.5, 0x0131: 'program', 0x0132: '2020:01:01 00:00:00'})
    tags.get_ifd(0x8769).update({0x9003: '2020:01:01 00:00:00', 0x829A: 0.01, 0x9000: b'0230'})
    tags.get_ifd(0x8825).update({1: 'N', 2: (1.0, 2.0, 3.0)})
    return tags


@functools.cache
def image_files(folder):
    """Small images of many formats, with EXIF where the format has it."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 16, 3), np.uint8))
    grey = Image.fromarray(rng.integers(0, 2**16, (24, 16), np.uint16))
    floats = Image.fromarray(rng.random((24, 16)).astype(np.float32))
    kinds = {
        'a.jpg': (rgb, {'exif': exif()}),
        'b.png': (rgb, {'exif': exif()}),
        'c.webp': (rgb, {'exif': exif()}),
        'd.tiff': (rgb, {'exif': exif()}),
        'e.gif': (rgb.convert('P'), {}),
        'f.bmp': (rgb, {}),
        'g.png': (grey, {'transparency': 7}),
        'h.tiff': (floats, {}),
        'i.tiff': (grey, {'compression': 'tiff_lzw'}),
        'j.ico': (rgb, {}),
        'k.png': (rgb.convert('LA'), {}),
        'l.jp2': (rgb, {}),
        'm.ppm': (rgb, {}),
        'n.tga': (rgb, {}),
    }
    for name, (image, options) in kinds.items():
        image.save(folder / name, **options)
    return {name: (folder / name).read_bytes() for name in kinds}


def fuzz_images(folder, rng):
    files = image_files(folder)
    name = rng.choice(sorted(files))
    file = folder / f'altered_{name}'
    if rng.random() < 0.5:
        file = folder / rng.choice(('exif.jpg', 'exif.png', 'exif.webp'))
        Image.new('RGB', (6, 4)).save(file, exif=alter_exif(exif().tobytes(), rng))
    else:
        file.write_bytes(alter(files[name], rng))
    pixels = images.read_image(file)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3


@functools.cache
def tensors_file(folder):
    rng = np.random.default_rng(0)
    tree = {
        'a': {'kernel': rng.random((4, 3)).astype(np.float32)},
        'b': np.ones((2, 2), bool),
        'c': np.zeros((), np.int32),
    }
    axes = sl.KernelAxes(layers=(), inputs=(0,), outputs=(1, 2))
    lora = {
        'q': {'kernel': sl.Lora(jnp.ones((8, 2)), jnp.ones((2, 4)), 2.0)},
        'heads': sl.Lora(jnp.ones((8, 2)), jnp.ones((2, 4)), 2.0, axes),
    }
    trees.save_safetensors(folder / 'plain', tree | lora, metadata={'config': '{}'})
    return without_checksums(folder / 'plain')


def fuzz_headers(folder, rng):
    data = tensors_file(folder)
    file = folder / 'altered'
    file.write_bytes(alter_header(data, rng) if rng.random() < 0.7 else alter(data, rng))
    try:
        for entry in safetensors_format.read_header(file):
            safetensors_format.read(entry)
    finally:  # both readers of the format
        trees.load_safetensors(file)


@functools.cache
def packed_file(folder):
    params = {'q': {'kernel': jax.random.normal(jax.random.key(0), (2, 16, 8))}}
    tree = {'blocks': params}
    pruned, masks = sl.prune_tree(tree, None, [('.*', '2:4')], method=sl.Magnitude())
    layers = {name: packing.pack(pruned, masks, name) for name in ('packed24', 'packed24_int4', 'bitmask')}
    lora = sl.init_lora(jax.random.key(1), tree, [('.*', (2, 4))])
    bound = sl.bind(layers['packed24'], None, lora)
    trees.save_safetensors(folder / 'packed', layers | {'bound': bound} | {'masks': packing.pack_masks(masks)})
    return without_checksums(folder / 'packed')


def without_checksums(file):
    """The bytes of a file without the checksums, which would refuse almost every alteration at once."""
    with safe_open(file, framework='np') as opened:
        metadata = opened.metadata()
    del metadata[trees.CHECKSUMS]
    return save(load_file(file), metadata=metadata)


def fuzz_packed(folder, rng):
    data = packed_file(folder)
    file = folder / 'altered'
    file.write_bytes(alter_header(data, rng) if rng.random() < 0.5 else alter(data, rng))
    tree, _ = trees.load_safetensors(file)
    jax.block_until_ready(sl.unpack(tree))


LINES = [
    {'image': 'a.png', 'prompt': 'what is it?', 'answer': 'a cat', 'split': 'train'},
    {'image': 'a.png', 'prompt': 'is it a dog?', 'answer': 'no', 'split': 'test', 'note': [1, {'a': None}]},
    {'image': 'b/c.png', 'prompt': 'what?', 'answer': 'é'},
]


def fuzz_lines(folder, rng):
    if not (folder / 'a.png').exists():
        (folder / 'b').mkdir()
        for name in ('a.png', 'b/c.png'):
            Image.new('L', (2, 2)).save(folder / name)
    lines = [alter_json(line, rng) if rng.random() < 0.4 else line for line in LINES]
    data = '\n'.join(json.dumps(line) for line in lines).encode()
    (folder / 'data.jsonl').write_bytes(alter(data, rng) if rng.random() < 0.6 else data)
    read_folder(folder)


@functools.cache
def checkpoint_files_of(folder):
    checkpoints = Checkpoints(folder / 'run')
    checkpoints.save(3, checkpoint_state())
    checkpoints.finish()
    return {file: file.read_bytes() for file in sorted((folder / 'run').rglob('*')) if file.is_file()}


@functools.cache
def checkpoint_state():
    return sl.init_state({'q': {'kernel': sl.Lora(jnp.ones((4, 2)), jnp.ones((2, 4)), 2.0)}}, optax.sgd(0.1))


def fuzz_checkpoints(folder, rng):
    files = checkpoint_files_of(folder)
    hashed = [file for file in sorted(files) if 'state/' in str(file) or file.name == MANIFEST]
    # Orbax's own files beside the arrays are not hashed; reading a state takes much longer than refusing it.
    file = rng.choice(hashed if rng.random() < 0.9 else sorted(files))
    file.write_bytes(alter(files[file], rng))
    state = Checkpoints(folder / 'run', warn=lambda line: None).restore(checkpoint_state())
    file.write_bytes(files[file])
    (folder / 'run/3' / MANIFEST).write_bytes(files[folder / 'run/3' / MANIFEST])  # removed where the hashes differ
    if state is None:  # there is no older checkpoint to fall back to
        raise CheckpointError('damaged')


def fuzz_json(folder, rng):
    """The JSON files beside weights and in workdirs."""
    index = {'metadata': {'total_size': 7}, 'weight_map': {'a/kernel': 'plain.safetensors', 'q': 'plain.safetensors'}}
    text = {'prompt': 'Q: {}', 'prompt_tokens': 4, 'answer_tokens': 3, 'decoding': {'num_beams': 2}}
    (folder / 'config.json').write_text('{}')
    (folder / 'plain.safetensors').write_bytes(tensors_file(folder))

    def damaged(value):
        data = json.dumps(value).encode()
        return alter(data, rng) if rng.random() < 0.5 else json.dumps(alter_json(value, rng)).encode()

    stamped = json.loads(digests.stamp({'a': [1.5]}, 'me'))
    readers = [
        ('model.safetensors.index.json', index, lambda path: checkpoint_files.open_checkpoint(folder)),
        (text_format.FILE, text, lambda path: text_format.load(folder, text_format.TextFormat())),
        ('stage.json', stamped, lambda path: digests.read_stamped(path, 'delete it', 'me')),
    ]
    name, value, read = rng.choice(readers)
    (folder / name).write_bytes(damaged(value))
    read(folder / name)


KINDS = [fuzz_images, fuzz_headers, fuzz_packed, fuzz_lines, fuzz_checkpoints, fuzz_json]


@pytest.mark.filterwarnings('ignore')  # of Pillow, about damaged files
@pytest.mark.parametrize('count', [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
def test_altered_files_end_as_a_value_or_as_an_error_of_ours(kind, count, tmp_path):
    started = time.monotonic()
    others = {}
    refused = 0
    for seed in range(count):
        try:
            kind(tmp_path, random.Random(seed))
        except SparseloraError:
            refused += 1
        except Exception as error:
            others.setdefault(f'{type(error).__name__}: {error}'[:150], []).append(seed)
    assert not others, f'{sum(map(len, others.values()))} of {count}: {others}'
    assert 0 < refused < count  # alterations neither all miss nor all hit
    assert time.monotonic() - started < SECONDS
