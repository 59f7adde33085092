"""A benchmark of full size fits into memory: all 214,354 questions of VQAv2's validation split."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / 'benchmarks' / 'index_annotations.py'
MOST_BYTES = 600e6


@pytest.mark.slow
def test_the_largest_validation_split_is_indexed_in_little_memory(tmp_path):
    """Memory is measured in a process of its own, as its growth beyond what the imports need."""
    script = runpy.run_path(str(SCRIPT))
    questions, _ = script['write'](tmp_path, 1.0)
    script['fill_images'](tmp_path)
    results = script['measure'](tmp_path)
    assert questions == results['index']['items'] == results['decode']['items'] == 214_354
    assert results['index']['bytes'] < MOST_BYTES
    # Decoding the files as wholes takes over a gigabyte, so the bound does tell readers apart.
    assert results['index']['bytes'] < results['decode']['bytes'] / 3
    assert results['decode']['bytes'] > MOST_BYTES
