"""Reads image files as 8-bit RGB, whatever their kind, and refuses those that could hang or exhaust the machine.

Images with more than 8 bits a channel (scanners, medicine) and images of floats are scaled by a fixed rule, see
`scale_to_8_bits`; docs/formats.md has it as a table.
"""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from sparselora_jax.runtime.errors import DataError

BLOCK = 4096  # bytes of a file that a fingerprint reads at a place
MOST_PIXELS = 2**26  # 8,192 x 8,192; reading a larger image takes gigabytes

# Modes of Pillow that `convert('RGB')` would clip at 255: integers of 16 and 32 bits, and floats.
_DEEP_MODES = ('I', 'F')
_ORIENTATION = 0x0112  # the tag of EXIF
# The value of the tag -> how to turn the pixels upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Largest values of integers with 8, 12, 16 and 31 bits. Devices with 12 bits write them into 16.
_RANGES = (2**8 - 1, 2**12 - 1, 2**16 - 1, 2**31 - 1)


def read_image(path: str | Path, *, is_benchmark: bool = False) -> UInt8[np.ndarray, 'height width 3']:
    """Read an image file as RGB: apply its EXIF orientation, and put transparent pixels on white.

    Args:
      path: a file of any format that Pillow decodes by itself.
      is_benchmark: see `to_rgb`.

    Raises:
      DataError: the file is missing or not an image, or has too many pixels.
    """
    try:
        with open_image(path) as image:
            return to_rgb(image, is_benchmark=is_benchmark)
    except FileNotFoundError:
        raise DataError(f'{path}: no such file') from None
    except DataError as error:
        raise DataError(f'{path}: not a readable image ({error})') from None


def decode_image(data: bytes, name: str, *, is_benchmark: bool = False) -> UInt8[np.ndarray, 'height width 3']:
    """Decode an image that is in memory; see `read_image`.

    Args:
      data: the bytes of an image file.
      name: where they come from, for messages.
      is_benchmark: see `to_rgb`.

    Raises:
      DataError: the bytes are not an image, or it has too many pixels.
    """
    try:
        with _open(BytesIO(data)) as image:
            return to_rgb(image, is_benchmark=is_benchmark)
    except DataError as error:
        raise DataError(f'{name}: not a readable image ({error})') from None


def fingerprint(path: Path) -> str:
    """Return a text that changes with an image file: a hash of its size and of blocks at its start, middle and end.

    Reading whole files would take minutes for a large folder. A small file is read whole. Of a larger one, a change
    between the blocks is not noticed; but another compressed image differs in all of them.

    Args:
      path: the file.
    """
    size = path.stat().st_size
    whole = sha256(str(size).encode())
    with path.open('rb') as file:
        if size <= 3 * BLOCK:
            whole.update(file.read())
        else:
            for start in (0, (size - BLOCK) // 2, size - BLOCK):
                file.seek(start)
                whole.update(file.read(BLOCK))
    return whole.hexdigest()


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file; its pixels are not decoded.

    Args:
      path: the file.

    Yields:
      The image. Errors of Pillow while it is used become a DataError.

    Raises:
      FileNotFoundError: no such file.
      DataError: the file is not an image, or has too many pixels.
    """
    try:
        # Opening a FIFO waits for a writer, and a device may never end.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise DataError('a folder, pipe or device, not a file')
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise DataError(_reason(error)) from None
    with _open(path) as image:
        yield image


def check_bytes(data: bytes, name: str) -> None:
    """Check that an image in memory can be opened; its pixels are not decoded.

    Args:
      data: the bytes of an image file.
      name: where they come from, for messages.

    Raises:
      DataError: the bytes are not an image, or it has too many pixels.
    """
    try:
        with _open(BytesIO(data)):
            pass
    except DataError as error:
        raise DataError(f'{name}: not a readable image ({error})') from None


@contextmanager
def _open(source: str | Path | BytesIO) -> Iterator[Image.Image]:
    """Open an image; errors of Pillow while it is used become a DataError."""
    try:
        with Image.open(source) as image:
            _check_size(image)
            yield image
    except (DataError, FileNotFoundError):
        raise
    # Pillow's decoders raise errors of any class for damaged files: struct.error, TypeError, KeyError and others.
    except Exception as error:
        raise DataError(_reason(error)) from None


def _check_size(image: Image.Image) -> None:
    """Check that an image can be decoded.

    Raises:
      DataError: it has too many pixels, or is a program.
    """
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise DataError(f'{width} x {height} pixels, at most {MOST_PIXELS:,} are read; make it smaller')
    # Pillow would run Ghostscript, another program, on the file.
    if image.format == 'EPS':
        raise DataError('PostScript, which is a program; convert it to PNG')


def _reason(error: Exception) -> str:
    """Return one line about an error of Pillow."""
    if isinstance(error, Image.UnidentifiedImageError):
        return 'no image format that Pillow knows'
    # `strerror` is an OSError's text, without errno and path.
    text = str(getattr(error, 'strerror', None) or error)
    return (text.splitlines() or [''])[0] or type(error).__name__


def to_rgb(image: Image.Image, *, is_benchmark: bool = False) -> UInt8[np.ndarray, 'height width 3']:
    """Return the pixels of an image as RGB, upright and on white.

    Args:
      image: an image of any mode; it is decoded here.
      is_benchmark: leave EXIF orientation and alpha alone, and clip levels above 255. The public code of benchmarks
        only calls `convert('RGB')`, so its scores are those of images that are neither turned, put on white nor scaled.

    Raises:
      DataError: a float is not finite.
    """
    image.load()
    if is_benchmark:
        return np.asarray(_as_rgb(image))
    upright = _upright(image)
    if is_deep(upright):
        grey = scale_to_8_bits(np.asarray(upright))
        # One grey level may mean transparent; `convert` knows that for images of 8 bits only.
        transparent = upright.info.get('transparency')
        if isinstance(transparent, int):
            grey = np.where(np.asarray(upright) == transparent, np.uint8(255), grey)
        return np.repeat(grey[..., None], 3, axis=2)
    if upright.has_transparency_data:
        # `convert('RGB')` alone would drop alpha and show the arbitrary colour stored in transparent pixels.
        upright = upright.convert('RGBA')
        upright = Image.alpha_composite(Image.new('RGBA', upright.size, 'white'), upright)
    return np.asarray(_as_rgb(upright))


def _as_rgb(image: Image.Image) -> Image.Image:
    # `convert` would copy an image that is RGB already.
    return image if image.mode == 'RGB' else image.convert('RGB')


def is_deep(image: Image.Image) -> bool:
    """Return whether an image has more than 8 bits a channel, so that `convert('RGB')` would clip it.

    Args:
      image: an image of any mode.
    """
    return image.mode.startswith(_DEEP_MODES)


def _upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF data say."""
    # Not `ImageOps.exif_transpose`, which writes all EXIF data again and fails if another tag is damaged.
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF data raise errors of any class, and the pixels can be used without them
        orientation = None
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def scale_to_8_bits(values: Shaped[np.ndarray, 'height width']) -> UInt8[np.ndarray, 'height width']:
    """Scale grey levels of more than 8 bits to 0..255.

    Integers are divided by the largest value of 8, 12, 16 or 31 bits: the smallest of these ranges that holds every
    value of the image. If a value is negative, the range is that of signed integers, and its lowest value is black.
    Floats up to 1 are multiplied by 255, and larger ones are scaled like integers. If a float is negative, the range is
    symmetric about 0.

    Args:
      values: integers or floats.

    Raises:
      DataError: a value is not finite.

    >>> scale_to_8_bits(np.array([[0, 2056, 65535]], np.uint16)).tolist()
    [[0, 8, 255]]
    >>> scale_to_8_bits(np.array([[0.0, 0.5, 1.0]], np.float32)).tolist()
    [[0, 128, 255]]
    """
    with np.errstate(invalid='ignore'):  # a damaged file may hold any NaN
        levels = values.astype(np.float64)  # holds every integer of 32 bits
    if not np.isfinite(levels).all():
        raise DataError('a pixel is not a finite number')
    if not levels.size:
        return levels.astype(np.uint8)
    is_float = np.issubdtype(values.dtype, np.floating)
    ranges = (1, *_RANGES) if is_float else _RANGES
    # Signed integers of n bits reach half as far as unsigned ones, on both sides of 0.
    is_signed = levels.min() < 0
    if is_signed:
        ranges = ranges if is_float else [(largest + 1) // 2 for largest in _RANGES[:-1]] + [2**31]
    magnitude = np.abs(levels).max()
    # A float may be larger than any integer; then its own magnitude is the range.
    largest = next((limit for limit in ranges if magnitude <= limit), magnitude)
    if is_signed:
        levels = (levels + largest) / (2 * largest)
    else:
        levels = levels / largest
    return np.clip(np.rint(levels * 255), 0, 255).astype(np.uint8)
