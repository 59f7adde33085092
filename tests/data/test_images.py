"""Image files of any kind become 8-bit RGB, and those that could hang or exhaust the machine are refused."""

import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from sparselora_jax.data import images
from sparselora_jax.data.folder import read_folder
from sparselora_jax.runtime.errors import DataError


@pytest.mark.parametrize(
    ('mode', 'suffix'), [('RGB', 'png'), ('RGBA', 'png'), ('L', 'png'), ('P', 'gif'), ('RGB', 'jpg')]
)
def test_an_image_of_any_kind_becomes_rgb(tmp_path, mode, suffix):
    path = tmp_path / f'image.{suffix}'
    Image.new('RGB', (30, 20), (255, 0, 0)).convert(mode).save(path)
    pixels = images.read_image(path)
    assert pixels.shape == (20, 30, 3)
    assert pixels.dtype == np.uint8
    want = (76, 76, 76) if mode == 'L' else (255, 0, 0)
    np.testing.assert_allclose(pixels.astype(int), np.broadcast_to(want, (20, 30, 3)), atol=2)


def test_an_image_is_turned_as_the_camera_says_and_lies_on_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the picture is on the right
    Image.new('RGB', (30, 20)).save(tmp_path / 'turned.png', exif=exif)
    assert images.read_image(tmp_path / 'turned.png').shape == (30, 20, 3)
    Image.new('RGBA', (3, 3), (255, 0, 0, 0)).save(tmp_path / 'clear.png')
    assert (images.read_image(tmp_path / 'clear.png') == 255).all()


LEVELS = np.random.default_rng(0).integers(0, 256, (7, 9, 4), np.uint8)
COLOURS = Image.fromarray(LEVELS[..., :3])
PALETTE = COLOURS.quantize(8)
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
# A kind of image: the image, the format of its file, and options of the format.
KINDS = {
    'RGB': (COLOURS, 'PNG', {}),
    'CMYK of JPEG': (COLOURS.convert('CMYK'), 'JPEG', {}),
    'CMYK of TIFF': (COLOURS.convert('CMYK'), 'TIFF', {}),
    'YCbCr': (COLOURS.convert('YCbCr'), 'TIFF', {}),
    'LAB': (Image.frombytes('LAB', COLOURS.size, COLOURS.tobytes()), 'TIFF', {}),
    'EXIF orientation': (COLOURS, 'JPEG', {'exif': ROTATED}),
    'palette': (PALETTE, 'PNG', {}),
    'palette with a transparent colour': (PALETTE, 'GIF', {'transparency': 2}),
    'palette with alpha': (PALETTE, 'PNG', {'transparency': bytes([0, 100, 255])}),
    'grey with alpha': (Image.merge('LA', COLOURS.split()[:2]), 'PNG', {}),
    'grey with a transparent level': (COLOURS.getchannel(0), 'PNG', {'transparency': 100}),
    'RGB with alpha': (Image.fromarray(LEVELS), 'PNG', {}),
    'black and white': (COLOURS.convert('1'), 'PNG', {}),
    '16 bits': (Image.fromarray(LEVELS[..., 0].astype(np.uint16) * 257), 'PNG', {}),
    '16 bits, few of them used': (Image.fromarray(LEVELS[..., 0].astype(np.uint16)), 'TIFF', {}),
    '32 bits': (Image.fromarray(LEVELS[..., 0].astype(np.int32) * 257), 'TIFF', {}),
    'floats': (Image.fromarray(LEVELS[..., 0].astype(np.float32) / 128), 'TIFF', {}),
}


@pytest.mark.filterwarnings('ignore:Palette images with Transparency')
@pytest.mark.parametrize('kind', KINDS)
def test_an_image_of_a_benchmark_is_what_pillow_converts(kind, tmp_path):
    image, file_format, options = KINDS[kind]
    path = tmp_path / 'image'
    image.save(path, file_format, **options)
    with Image.open(path) as read:
        want = np.asarray(read.convert('RGB'))
    np.testing.assert_array_equal(images.read_image(path, is_benchmark=True), want)
    np.testing.assert_array_equal(images.decode_image(path.read_bytes(), 'image', is_benchmark=True), want)


def test_a_file_that_is_no_image_is_named(tmp_path):
    with pytest.raises(DataError, match=r'absent.png: no such file'):
        images.read_image(tmp_path / 'absent.png')
    (tmp_path / 'text.png').write_text('no image')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / 'whole.png')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'whole.png').read_bytes()[:5000])
    (tmp_path / 'folder.png').mkdir()
    broken = bytearray((tmp_path / 'whole.png').read_bytes())
    broken[5000:5200] = bytes(200)
    (tmp_path / 'broken.png').write_bytes(broken)
    for name in ('text.png', 'cut.png', 'folder.png', 'broken.png'):
        with pytest.raises(DataError, match=f'{name}: not a readable image'):
            images.read_image(tmp_path / name)


RAMP = np.linspace(0, 1, 256).reshape(16, 16)  # in steps of one 8-bit level


@pytest.mark.parametrize('suffix', ['png', 'tiff'])
@pytest.mark.parametrize(
    ('dtype', 'bits'),
    [(np.uint16, 16), (np.uint16, 12), (np.int32, 8), (np.int32, 16), (np.int32, 31)],
)
def test_integers_of_more_than_8_bits_are_scaled_by_their_range(tmp_path, dtype, bits, suffix):
    if suffix == 'png' and dtype == np.int32:
        pytest.skip('PNG holds at most 16 bits')
    path = tmp_path / f'ramp.{suffix}'
    Image.fromarray(np.rint(RAMP * (2**bits - 1)).astype(dtype)).save(path)
    pixels = images.read_image(path)
    np.testing.assert_array_equal(pixels, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


@pytest.mark.parametrize(('low', 'high'), [(0, 1), (0, 255), (0, 65535), (-1, 1), (0, 1e30)])
def test_floats_are_scaled_by_their_range(tmp_path, low, high):
    Image.fromarray((low + RAMP * (high - low)).astype(np.float32)).save(tmp_path / 'ramp.tiff')
    pixels = images.read_image(tmp_path / 'ramp.tiff')
    np.testing.assert_allclose(pixels[..., 0].astype(int), np.arange(256).reshape(16, 16), atol=1)


def test_signed_integers_have_black_at_the_lowest_value_of_their_range():
    got = images.scale_to_8_bits(np.array([[-(2**15), 0, 2**15 - 1]], np.int32))
    assert got.tolist() == [[0, 128, 255]]


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_float_that_is_not_finite_is_refused(tmp_path, value):
    Image.fromarray(np.full((2, 2), value, np.float32)).save(tmp_path / 'a.tiff')
    with pytest.raises(DataError, match=r'a.tiff: not a readable image \(a pixel is not a finite number\)'):
        images.read_image(tmp_path / 'a.tiff')


def test_a_transparent_grey_level_of_16_bits_becomes_white(tmp_path):
    levels = np.full((4, 4), 60000, np.uint16)
    levels[0] = 7
    Image.fromarray(levels).save(tmp_path / 'a.png', transparency=7)
    pixels = images.read_image(tmp_path / 'a.png')
    assert (pixels[0] == 255).all()
    assert (pixels[1:] == 233).all()


def exif_block(tag, kind, count, payload, orientation=6):
    """EXIF data with the orientation and one entry of any type, as a damaged file may have them."""
    entries = sorted([(0x0112, 3, 1, orientation.to_bytes(4, 'little')), (tag, kind, count, payload)])
    block = b'Exif\0\0II*\0' + (8).to_bytes(4, 'little') + len(entries).to_bytes(2, 'little')
    for number, of_type, of_count, value in entries:
        block += number.to_bytes(2, 'little') + of_type.to_bytes(2, 'little') + of_count.to_bytes(4, 'little')
        block += value[:4].ljust(4, b'\0')
    return block + bytes(64)


@pytest.mark.parametrize('kind', range(14))
@pytest.mark.parametrize('tag', [0x0100, 0x010E, 0x011A, 0x0128, 0x0131, 0x0132, 0x8298, 0x8769, 0x8825, 0xA005])
def test_an_image_is_turned_whatever_the_types_of_its_other_tags(tmp_path, tag, kind):
    path = tmp_path / 'a.jpg'
    Image.new('RGB', (30, 20), (9, 9, 9)).save(path, exif=exif_block(tag, kind, 1, b'\x10\0\0\0'))
    assert images.read_image(path).shape == (30, 20, 3)


@pytest.mark.parametrize('kind', [2, 7, 5, 11])
def test_an_orientation_of_the_wrong_type_is_ignored(tmp_path, kind):
    exif = b'Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01' + kind.to_bytes(2, 'little') + b'\x01\0\0\0\x06\0\0\0' + bytes(16)
    Image.new('RGB', (30, 20)).save(tmp_path / 'a.jpg', exif=exif)
    assert images.read_image(tmp_path / 'a.jpg').shape == (20, 30, 3)


@pytest.mark.slow
def test_a_pipe_or_a_device_is_left_out_and_named_without_opening_it(tmp_path):
    os.mkfifo(tmp_path / 'pipe.png')
    Image.new('L', (2, 2)).save(tmp_path / 'a.png')
    line = '{{"image": "{}", "prompt": "p", "answer": "{}"}}\n'
    (tmp_path / 'data.jsonl').write_text(line.format('pipe.png', 1) + line.format('a.png', 2))
    read = 'import sys; from sparselora_jax.data import images; images.read_image(sys.argv[1])'
    for path in (tmp_path / 'pipe.png', '/dev/zero'):
        # In another process, which would hang otherwise.
        done = subprocess.run(
            [sys.executable, '-c', read, path], capture_output=True, text=True, timeout=60, check=False
        )
        assert f'{path}: not a readable image (a folder, pipe or device, not a file)' in done.stderr
    folder = read_folder(tmp_path)
    assert [problem.reason for problem in folder.problems] == [
        'image pipe.png cannot be read: a folder, pipe or device, not a file'
    ]


def test_an_image_that_would_exhaust_the_memory_is_refused_before_it_is_decoded(tmp_path):
    side = 9000
    Image.new('1', (side, side)).save(tmp_path / 'huge.png')
    with pytest.raises(DataError, match=r'huge.png: .*9000 x 9000 pixels, at most 67,108,864 are read'):
        images.read_image(tmp_path / 'huge.png')
    header = bytearray((tmp_path / 'huge.png').read_bytes())
    header[16:24] = (100_000).to_bytes(4, 'big') * 2  # a bomb: Pillow itself refuses it
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, 'big')
    (tmp_path / 'bomb.png').write_bytes(header)
    with pytest.raises(DataError, match=r'bomb.png: not a readable image \(.*decompression bomb'):
        images.read_image(tmp_path / 'bomb.png')


def test_a_postscript_program_is_not_run(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n')
    with pytest.raises(DataError, match='PostScript'):
        images.read_image(tmp_path / 'a.png')


@pytest.mark.parametrize('size', [0, 10, 3 * images.BLOCK, 10 * images.BLOCK])
def test_a_fingerprint_changes_with_the_content_and_not_with_the_time(tmp_path, size):
    path = tmp_path / 'a.jpg'
    data = np.random.default_rng(0).bytes(size)
    path.write_bytes(data)
    before = images.fingerprint(path)
    os.utime(path, ns=(1, 1))
    assert images.fingerprint(path) == before
    path.write_bytes(data + b'x')
    assert images.fingerprint(path) != before
    for place in (0, size // 2, size - 1):
        if size:
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert images.fingerprint(path) != before
