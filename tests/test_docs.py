"""What the documents name exists, every public name is documented, and tutorials hold no outputs."""

import re
from pathlib import Path

import pytest

import sparselora_jax as sl
from sparselora_jax.recipe.fields import FIELDS, fields_page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = [page for page in DOCS.rglob('*.md') if not page.is_relative_to(DOCS / '_build')]
DOCUMENTS = sorted([*ROOT.glob('*.md'), *PAGES, *(ROOT / 'sparselora_jax').rglob('*.md')])
TUTORIALS = sorted((DOCS / 'tutorials').glob('*.md'))


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


def test_the_reference_documents_every_public_name():
    documented = re.findall(r'^\.\. auto\w+:: (\w+)$', (DOCS / 'api' / 'index.md').read_text(), re.M)
    assert sorted(documented) == sorted(sl.__all__)


def test_the_page_of_fields_lists_every_field():
    page = fields_page()
    assert page.startswith('# ')  # docs/conf.py leaves the title to docs/config.md
    assert all(f'`{field.name}`' in page for field in FIELDS)
    headings = re.findall(r'^## .*$', page, re.M)
    assert len(headings) == len(set(headings))


@pytest.mark.parametrize('tutorial', TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_begins_with_what_to_install_and_how_long_it_takes(tutorial):
    _, _, text = tutorial.read_text().partition('\n# ')
    first = text.split('\n\n')[1].replace('\n', ' ')
    assert re.search(r'run `pip install .*in a clone.* It takes .* on two CPU cores\.', first)


@pytest.mark.parametrize('tutorial', TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_a_notebook_whose_code_compiles(tutorial):
    text = tutorial.read_text()
    assert text.startswith('---\njupytext:')
    cells = re.findall(r'^```\{code-cell\}[^\n]*\n(.*?)^```$', text, re.M | re.S)
    assert len(cells) >= 4
    for number, cell in enumerate(cells):
        code = re.sub(r'\A(:.*\n)+', '', cell)
        compile(code, f'{tutorial.name}, cell {number}', 'exec')
