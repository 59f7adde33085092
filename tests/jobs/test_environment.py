"""The description of a run: one line at its start, and a record in the workdir of everything that computed a stage."""

import jax
import pytest
import transformers
from test_job import tiny_config

from sparselora_jax.jobs import environment
from sparselora_jax.jobs.stored import Stored


def test_the_header_is_one_line_that_names_versions_devices_and_inputs():
    described = environment.describe(tiny_config(dtype='bfloat16'))
    line = environment.header(described)
    assert '\n' not in line
    for part in (f'jax {jax.__version__}', f'transformers {transformers.__version__}', 'in bfloat16', 'no mesh'):
        assert part in line
    assert f'{jax.device_count()} cpu device' in line
    assert 'model embedded' in line
    assert 'data easy_vqa' in line


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'devices': 1}, '1 cpu device with 3 cores'),
        ({'devices': 4, 'processes': 2}, '4 cpu devices with 3 cores in 2 processes'),
        ({'platform': 'gpu', 'device_kind': 'NVIDIA H200', 'devices': 1}, '1 NVIDIA H200 device'),
    ],
)
def test_devices_are_counted_in_words(changes, words):
    described = {'platform': 'cpu', 'device_kind': 'cpu', 'devices': 1, 'cores': 3, 'processes': 1}
    assert environment.devices(described | changes) == words


def test_the_mesh_is_named_by_its_axes():
    assert environment.mesh({'mesh': {'data': 1, 'fsdp': 1, 'tensor': 1}}) == 'no mesh'
    assert environment.mesh({'mesh': {'data': 1, 'fsdp': 2, 'tensor': 2}}) == 'mesh data=1 x fsdp=2 x tensor=2'


def test_each_environment_is_recorded_once(tmp_path):
    stored = Stored(tmp_path, 'a recipe')
    described = environment.describe(tiny_config())
    assert environment.recorded(stored) == []
    for other in (described, described, described | {'devices': 8}):
        environment.record(stored, other)
    assert environment.recorded(stored) == [described, described | {'devices': 8}]
