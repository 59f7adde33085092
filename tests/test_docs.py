"""What the documents name exists, and the README's examples print what it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md'), *(ROOT / 'sparselora_jax').rglob('*.md')])


def named_files(text):
    """The files of the repository that a text names in backticks or commands."""
    return set(
        re.findall(r'(?<![\w/.-])((?:sparselora_jax|tests|launch|configs|benchmarks|docs)/[\w/]+\.(?:py|md))', text)
    )


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document):
    missing = [name for name in named_files(document.read_text()) if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_links_of_a_document_lead_somewhere(document):
    for target in re.findall(r'\]\(([^)\s]+)\)', document.read_text()):
        if target.startswith('http'):
            continue
        path, _, heading = target.partition('#')
        file = (document.parent / path) if path else document
        assert file.exists(), target
        if heading:
            anchors = [
                re.sub(r'[^\w\- ]', '', line.lstrip('#').strip().lower()).replace(' ', '-')
                for line in file.read_text().splitlines()
                if line.startswith('#')
            ]
            assert heading in anchors, target


def test_the_life_of_a_weight_crosses_at_most_eight_files():
    files = named_files((ROOT / 'docs' / 'life_of_a_weight.md').read_text())
    assert 0 < len([name for name in files if name.startswith('sparselora_jax/')]) <= 8
