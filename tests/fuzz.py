"""Random alterations of files: bits, bytes, runs and lengths, from a seed."""

import json
import random


def alter(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with one to four random alterations."""
    altered = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not altered:
            break
        at = rng.randrange(len(altered))
        kind = rng.randrange(7)
        if kind == 0:
            altered[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            altered[at] = rng.choice((0, 1, 0x20, 0x22, 0x7B, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del altered[at:]
        elif kind == 3:
            del altered[at : at + rng.randint(1, 16)]
        elif kind == 4:
            altered[at:at] = rng.randbytes(rng.randint(1, 16))
        elif kind == 5:
            # A number of four bytes: a length or an offset, if one lies here.
            altered[at : at + 4] = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1)).to_bytes(
                4, rng.choice(['little', 'big'])
            )
        else:
            source = rng.randrange(len(altered))
            altered[at : at + 8] = altered[source : source + 8]
    return bytes(altered)


VALUES = (None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, 0.5, 1e400, '', 'F32', 'x' * 300, '\ud800', [], {}, [0, -1])


def alter_json(value, rng: random.Random):
    """Return a JSON value in which one random part is replaced, removed or moved."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        kind = rng.random()
        if kind < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if kind < 0.2:
            return {(f'{name}/kernel' if name == key else name): item for name, item in value.items()}
        return value | {key: alter_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:at] + value[at + 1 :]
        return [*value[:at], alter_json(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 2**40))
    return rng.choice(VALUES)


def alter_header(data: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file whose header is altered as JSON; its length is right."""
    length = int.from_bytes(data[:8], 'little')
    header = alter_json(json.loads(data[8 : 8 + length]), rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + data[8 + length :]


def alter_exif(data: bytes, rng: random.Random) -> bytes:
    """Return EXIF data (`Image.Exif().tobytes()`) in which tag, type, count or value of one entry is altered."""
    altered = bytearray(data)
    start = data.index(b'Exif\0\0') + 6
    order = 'little' if data[start : start + 2] == b'II' else 'big'
    first = start + int.from_bytes(data[start + 4 : start + 8], order)
    entries = int.from_bytes(data[first : first + 2], order)
    entry = first + 2 + 12 * rng.randrange(entries)
    part, size = rng.choice(((0, 2), (2, 2), (2, 2), (4, 4), (8, 4)))
    value = {0: rng.choice((0x0112, 0x8769, 0x8825, rng.randrange(2**16))), 2: rng.randrange(15)}.get(part)
    if value is None:
        value = rng.choice((0, 1, 2, 5, 6, 2**31, 2**32 - 1, rng.randrange(2**10)))
    altered[entry + part : entry + part + size] = value.to_bytes(size, order)
    return bytes(altered)
