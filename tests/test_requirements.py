"""requirements.txt declares what the code imports, and nothing else."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ('sparselora_jax', 'launch', 'configs')
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


def declared() -> dict[str, str]:
    """Return the requirement line of each distribution in requirements.txt."""
    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    requirements = [line for line in lines if line.strip() and not line.startswith('#')]
    return {normalised(re.match(r'[\w.-]+', line)[0]): line for line in requirements}


def imported() -> dict[str, str]:
    """Return the top-level packages that the code imports, each with a file that does."""
    packages = {}
    for file in (file for folder in CODE for file in sorted((ROOT / folder).rglob('*.py'))):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module] if node.level == 0 else []
            else:
                continue
            packages |= {module.partition('.')[0]: str(file.relative_to(ROOT)) for module in modules}
    return {name: file for name, file in packages.items() if name not in sys.stdlib_module_names and name not in OURS}


def distributions(package: str) -> set[str]:
    return {normalised(name) for name in packages_distributions().get(package, [package])}


def test_every_import_is_declared():
    undeclared = {name: file for name, file in imported().items() if not distributions(name) & declared().keys()}
    assert not undeclared, 'add these to requirements.txt'


def test_every_requirement_is_imported_or_says_why_it_is_not():
    used = {distribution for package in imported() for distribution in distributions(package)}
    assert declared().keys() - used == NOT_IMPORTED.keys()


@pytest.mark.parametrize('line', declared().values())
def test_a_requirement_has_bounds(line):
    """A lowest and a next incompatible version, or one exact version."""
    assert re.fullmatch(r'[\w.-]+(==[\d.]+|>=[\d.]+,<[\d.]+)', line)
