"""pyproject.toml declares what the code imports, and nothing else; the library needs only the plain requirements."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
PLAIN = PYPROJECT['project']['dependencies']
EXTRAS = PYPROJECT['project']['optional-dependencies']
# The contract that keeps these modules out of the rest of the package also says which modules may need `train`.
(LIBRARY_CONTRACT,) = (c for c in PYPROJECT['tool']['importlinter']['contracts'] if c['type'] == 'forbidden')
# Imported by their names alone: our own packages, and the module that the scripts share.
OURS = {'sparselora_jax', 'configs', 'cli'}
# Declared, but imported by none of our files: why each is needed.
NOT_IMPORTED = {
    'sentencepiece': "transformers reads the tokenizers of LLaMA, T5 and Gemma from a directory's spiece.model with it",
    'array-record': 'tensorflow-datasets writes and reads the records of easy-VQA with it',
    'importlib-resources': 'tensorflow-datasets imports it, and declares it for old versions of Python alone',
    'easy-vqa': 'a data set as a package; its files are read, it is never imported',
}


def normalised(distribution: str) -> str:
    """Return a distribution's name as package indexes compare it."""
    return re.sub(r'[-_.]+', '-', distribution).lower()


def declared(requirements: Iterable[str]) -> set[str]:
    """Return the names of distributions in requirements."""
    return {normalised(re.match(r'[\w.-]+', requirement)[0]) for requirement in requirements}


def is_train_only(file: Path) -> bool:
    """Return whether a file of the package belongs to a module that needs the extra `train`."""
    module = '.'.join(file.relative_to(ROOT).with_suffix('').parts)
    return any(f'{module}.'.startswith(f'{train_module}.') for train_module in LIBRARY_CONTRACT['forbidden_modules'])


def library_files() -> list[Path]:
    return [file for file in sorted((ROOT / 'sparselora_jax').rglob('*.py')) if not is_train_only(file)]


def train_files() -> list[Path]:
    package = [file for file in sorted((ROOT / 'sparselora_jax').rglob('*.py')) if is_train_only(file)]
    return [*package, *(file for folder in ('launch', 'configs') for file in sorted((ROOT / folder).rglob('*.py')))]


def imported_modules(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def imported(files: Iterable[Path]) -> dict[str, str]:
    """Return the top-level packages that the files import, each with a file that does."""
    packages = {
        module.partition('.')[0]: str(file.relative_to(ROOT)) for file in files for module in imported_modules(file)
    }
    return {name: file for name, file in packages.items() if name not in sys.stdlib_module_names and name not in OURS}


def distributions(package: str) -> set[str]:
    return {normalised(name) for name in packages_distributions().get(package, [package])}


def undeclared(files: Iterable[Path], requirements: Iterable[str]) -> dict[str, str]:
    """Return the packages that the files import and the requirements lack, each with a file that imports it."""
    names = declared(requirements)
    return {package: file for package, file in imported(files).items() if not distributions(package) & names}


def unused(files: Iterable[Path], requirements: Iterable[str]) -> set[str]:
    """Return the distributions that the requirements name, and the files do not import."""
    used = {distribution for package in imported(files) for distribution in distributions(package)}
    return declared(requirements) - used


@pytest.mark.slow
def test_the_library_imports_only_plain_requirements():
    assert not undeclared(library_files(), PLAIN), 'declare these as dependencies, or move the code to a train module'


@pytest.mark.slow
def test_recipes_import_only_plain_and_train_requirements():
    assert not undeclared(train_files(), PLAIN + EXTRAS['train']), 'add these to the extra `train`'


@pytest.mark.slow
def test_every_requirement_is_imported_or_says_why_it_is_not():
    not_imported = unused(library_files(), PLAIN) | unused(train_files(), EXTRAS['train'])
    assert not_imported == NOT_IMPORTED.keys()


def test_no_requirement_is_declared_twice():
    assert not declared(PLAIN) & declared(EXTRAS['train'])


@pytest.mark.parametrize('module', LIBRARY_CONTRACT['forbidden_modules'])
def test_a_train_module_exists(module):
    path = ROOT.joinpath(*module.split('.'))
    assert path.is_dir() or path.with_suffix('.py').is_file()


@pytest.mark.parametrize('requirement', sorted({*PLAIN, *(line for extra in EXTRAS.values() for line in extra)}))
def test_a_requirement_has_bounds(requirement):
    """A lowest and a next incompatible version, or one exact version; an extra of jax has those of jax."""
    assert re.fullmatch(r'jax\[\w+\]|[\w.-]+(==[\d.]+|>=[\d.]+,<[\d.]+)', requirement)


@pytest.mark.parametrize('file', sorted(ROOT.glob('requirements*.txt')), ids=lambda file: file.name)
def test_a_requirements_file_names_extras_and_no_version(file):
    if file.name == 'requirements-assets.txt':
        pytest.skip('assets are files in packages: exact versions with their hashes')
    (line,) = (line for line in file.read_text().splitlines() if not line.startswith('#'))
    extras = re.fullmatch(r'-e \.\[([\w,-]+)\]', line)[1].split(',')
    assert set(extras) <= EXTRAS.keys()
