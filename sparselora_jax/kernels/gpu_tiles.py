"""Tiles of the kernels in gpu.py; written by `python benchmarks/tune.py`.

Of a product and a kind of weights: up to so many rows this tile: rows, outputs, octets, warps, stages. Where the rows
are more than the last, unpacking to memory and a dense product are estimated to take no longer.
"""

TILES = {
    ('forward', 'values'): (
        (16, (16, 32, 32, 4, 3)),
        (64, (64, 32, 32, 4, 3)),
        (256, (128, 64, 16, 8, 3)),
        (512, (128, 64, 16, 8, 3)),
    ),
    ('forward', 'int4'): (
        (16, (16, 32, 16, 4, 3)),
        (64, (64, 32, 16, 4, 3)),
        (256, (128, 64, 16, 8, 3)),
    ),
    ('transposed', 'values'): (
        (16, (16, 128, 4, 4, 3)),
        (64, (64, 128, 4, 4, 3)),
        (256, (128, 128, 8, 8, 3)),
        (512, (128, 128, 8, 8, 3)),
    ),
    ('transposed', 'int4'): (
        (16, (16, 128, 4, 4, 3)),
        (64, (64, 128, 8, 4, 3)),
    ),
}
