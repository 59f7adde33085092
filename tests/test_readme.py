"""What the README shows runs and prints what it says; it stays short, and its figures are those that CI checks."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
EXAMPLES = re.findall(r'^```python\n(.*?)^```$', README, re.M | re.S)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A working directory with what the examples read: a small model and a picture."""
    (tmp_path / 'DIRECTORY').mkdir()
    tiny_models.save('blip2-opt', tmp_path / 'DIRECTORY')
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'IMAGE.png')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_run_in_order_and_print_what_they_say(own_folder, capsys):
    assert len(EXAMPLES) >= 2
    namespace = {}
    for number, example in enumerate(EXAMPLES):
        exec(compile(example, f'README.md, example {number}', 'exec'), namespace)
    promised = re.findall(r'^print\(.*\)  # (.*)$', '\n'.join(EXAMPLES), re.M)
    assert promised
    assert capsys.readouterr().out.splitlines() == promised
    assert (own_folder / 'OUT' / 'model.safetensors').exists()


def test_the_figures_of_the_demo_are_those_that_ci_compares_with_a_run():
    promised = runpy.run_path(str(ROOT / '.ci' / 'check_report.py'))['promised_scores'](README)
    assert promised.keys() == {'dense', 'pruned', 'restored'}
    assert promised['pruned'] < promised['dense']


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_a_cell_of_a_table_is_a_phrase():
    cells = [cell.strip() for line in README.splitlines() if line.startswith('|') for cell in line.split('|')]
    # The target of a link is not read.
    shown = [re.sub(r'\]\([^)]*\)', ']', cell) for cell in cells]
    assert max(map(len, shown)) <= 90, max(shown, key=len)
