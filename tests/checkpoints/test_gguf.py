"""GGUF files: what the header says is followed, and what would give other numbers is refused."""

import gguf as writer
import numpy as np
import pytest

from sparselora_jax.checkpoints import gguf
from sparselora_jax.models import llama
from sparselora_jax.sparse import rules

WIDTH, HEADS, VOCAB = 8, 2, 5
NUMBERS = {
    'embedding_length': WIDTH,
    'block_count': 1,
    'attention.head_count': HEADS,
    'attention.head_count_kv': HEADS,
    'feed_forward_length': 12,
    'context_length': 32,
}


def write(path, *, head_dim=WIDTH // HEADS, header=(), tensors=()):
    """A LLaMA of one layer, with more in its header and among its tensors."""
    file, rng = writer.GGUFWriter(path, 'llama'), np.random.default_rng(0)
    for name, value in (NUMBERS | dict(header)).items():
        {int: file.add_uint32, float: file.add_float32, str: file.add_string}[type(value)](f'llama.{name}', value)
    file.add_float32('llama.rope.freq_base', 1e4)
    file.add_float32('llama.attention.layer_norm_rms_epsilon', 1e-5)
    inner = HEADS * head_dim
    shapes = {'token_embd': (VOCAB, WIDTH), 'output_norm': (WIDTH,)}
    shapes |= {f'blk.0.{name}': (WIDTH,) for name in ('attn_norm', 'ffn_norm')}
    shapes |= {f'blk.0.attn_{name}': (inner, WIDTH) for name in 'qkv'} | {'blk.0.attn_output': (WIDTH, inner)}
    shapes |= {'blk.0.ffn_gate': (12, WIDTH), 'blk.0.ffn_up': (12, WIDTH), 'blk.0.ffn_down': (WIDTH, 12)}
    for name, shape in ({f'{name}.weight': shape for name, shape in shapes.items()} | dict(tensors)).items():
        file.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


@pytest.mark.parametrize('tensors', [{}, {'output.weight': (VOCAB, WIDTH)}])
def test_a_head_of_its_own_unties(tensors, tmp_path):
    cfg, params = gguf.load_llama(write(tmp_path / 'a.gguf', tensors=tensors))
    assert cfg.tied == (not tensors)
    assert {path: leaf.shape for path, leaf in rules.flatten(params).items()} == rules.flatten(llama.shapes(cfg))


def test_heads_may_be_wider_than_their_share(tmp_path):
    sizes = {'attention.key_length': 6, 'attention.value_length': 6, 'rope.dimension_count': 6}
    cfg, params = gguf.load_llama(write(tmp_path / 'a.gguf', head_dim=6, header=sizes))
    assert cfg.head_dim == 6
    assert {path: leaf.shape for path, leaf in rules.flatten(params).items()} == rules.flatten(llama.shapes(cfg))


@pytest.mark.parametrize(
    ('header', 'tensors', 'message'),
    [
        ({'rope.scaling.type': 'yarn'}, {}, "llama.rope.scaling.type 'yarn': only plain rotary positions are known"),
        ({'rope.scale_linear': 2.0}, {}, 'llama.rope.scale_linear 2.0: only plain'),
        ({'rope.dimension_count': 2}, {}, 'llama.rope.dimension_count 2: expected that of a head, 4'),
        ({'attention.value_length': 6}, {}, 'llama.attention.value_length 6: expected that of a head, 4'),
        ({}, {'rope_freqs.weight': (2,)}, 'a.gguf: no place for its tensors rope_freqs.weight'),
        ({}, {'blk.0.attn_q.bias': (WIDTH,)}, 'a.gguf: no place for its tensors blk.0.attn_q.bias'),
    ],
)
def test_what_would_be_lost_is_refused(header, tensors, message, tmp_path):
    path = write(tmp_path / 'a.gguf', header=header, tensors=tensors)
    with pytest.raises(gguf.AssetError, match=message):
        gguf.load_llama(path)


def test_plain_positions_may_be_said(tmp_path):
    gguf.load_llama(write(tmp_path / 'a.gguf', header={'rope.scaling.type': 'none', 'rope.scale_linear': 1.0}))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(gguf.AssetError, match=r'absent.gguf: no such file'):
        gguf.load_llama(tmp_path / 'absent.gguf')


@pytest.mark.slow
def test_truncated_file_is_named(tmp_path, smollm2_file):
    path = tmp_path / 'cut.gguf'
    with smollm2_file.open('rb') as source:
        path.write_bytes(source.read(10_000_000))
    with pytest.raises(gguf.AssetError, match=r'cut.gguf: not a complete GGUF file'):
        gguf.load_llama(path)


def test_other_format_is_named(tmp_path):
    path = tmp_path / 'text.gguf'
    path.write_text('not a model' * 100)
    with pytest.raises(gguf.AssetError, match=r'text.gguf: not a complete GGUF file'):
        gguf.load_llama(path)
