"""Fastest tiles of the kernels in gpu.py, measured on an NVIDIA H200; to remeasure, run `python benchmarks/tune.py`.

`TILES[kernel, weights]` lists `(max_rows, tile)`. The first entry whose `max_rows` is not exceeded is used. A tile is
(rows, outputs, octets, warps, stages, splits). With more rows than in the last entry, another kernel is faster, or
unpacking to memory and a dense product. The comments give the time relative to the dense product, and that of the next
best method.
"""

TILES = {
    ('few', 'values'): (
        (1, (1, 128, 8, 4, 1, 16)),  # 0.73 of dense; next best 0.81
    ),
    ('few', 'int4'): (
        (1, (1, 128, 8, 2, 1, 32)),  # 0.71 of dense; next best 0.76
    ),
    ('forward', 'values'): (
        (16, (16, 128, 8, 4, 5, 4)),  # 0.81 of dense; next best 2.38
        (64, (64, 128, 8, 4, 4, 4)),  # 0.80 of dense; next best 2.02
    ),
    ('forward', 'int4'): (
        (16, (16, 128, 8, 4, 3, 16)),  # 0.82 of dense; next best 2.09
        (64, (64, 64, 16, 4, 3, 4)),  # 0.94 of dense; next best 1.81
    ),
    ('transposed', 'values'): (
        (16, (16, 64, 16, 4, 5, 4)),  # 0.81 of dense; next best 2.31
        (64, (64, 64, 8, 4, 3, 4)),  # 1.14 of dense; next best 2.05
    ),
    ('transposed', 'int4'): (
        (16, (16, 64, 16, 4, 3, 8)),  # with 16 splits 3 % faster on an H100, and 0.68 by the estimate for a B200
        (64, (64, 64, 8, 4, 3, 4)),  # 1.45 of dense; next best 1.85
    ),
    ('unpack', 'values'): ((0, (1, 256, 4, 4, 1, 1)),),
    ('unpack', 'int4'): ((0, (1, 256, 4, 4, 1, 1)),),
}
