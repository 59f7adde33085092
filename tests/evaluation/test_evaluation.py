"""The figures of a report against plain numpy and torch: accuracy, intervals, floors, densities, perplexity."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparselora_jax as sl
from sparselora_jax.checkpoints import embedded
from sparselora_jax.data import easy_vqa
from sparselora_jax.data.dataset import Split
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.evaluation import density, intervals, vqa
from sparselora_jax.evaluation.metric import METRICS, Metric, MetricError
from sparselora_jax.evaluation.perplexity import perplexity, window_losses
from sparselora_jax.models import llama
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.files import StorageError
from sparselora_jax.runtime.registry import UnknownNameError


def answers_with(rate, seed):
    return (np.random.default_rng(seed).random(1000) < rate).astype(np.float64)


def test_an_interval_agrees_with_the_normal_approximation():
    first, second = answers_with(0.9, 1), answers_with(0.7, 2)
    difference = first - second
    half = 1.96 * difference.std() / np.sqrt(1000)
    low, high = intervals.paired_interval(first, second)
    np.testing.assert_allclose([low, high], [difference.mean() - half, difference.mean() + half], atol=0.003)


def test_an_interval_is_paired_signed_and_repeatable():
    first, second = answers_with(0.9, 1), answers_with(0.9, 2)
    low, high = intervals.paired_interval(first, first)
    assert low == -high
    assert 0 < high < 0.026 / 5  # 1.96 standard errors of a difference that is not paired are 0.026
    low, high = intervals.paired_interval(first, second)
    np.testing.assert_allclose(intervals.paired_interval(second, first), (-high, -low), atol=1e-12)
    assert intervals.paired_interval(first, second) == (low, high)


@pytest.mark.parametrize(
    ('both', 'first_alone', 'second_alone', 'neither', 'want'),
    [(36, 12, 2, 0, (0.0569, 0.3404)), (1000, 0, 0, 0, (-0.0038, 0.0038))],
    ids=['published', 'all right'],
)
def test_an_interval_of_right_and_wrong_answers_is_newcombes(both, first_alone, second_alone, neither, want):
    """The first row is the example of Newcombe (1998), table II; the second is that of two Wilson intervals at 1."""
    first = np.repeat([1.0, 1.0, 0.0, 0.0], [both, first_alone, second_alone, neither])
    second = np.repeat([1.0, 0.0, 1.0, 0.0], [both, first_alone, second_alone, neither])
    np.testing.assert_allclose(intervals.paired_interval(first, second), want, atol=5e-5)


def test_an_interval_of_one_question_is_its_difference():
    assert intervals.paired_interval(np.array([1.0]), np.array([0.25])) == (0.75, 0.75)


def test_the_interval_of_a_score_stays_honest_at_its_ends():
    """Wilson's closed form; the ends of a perfect score differ, unlike those of a bootstrap."""
    z, n = 1.959964, 50
    for right in (0, 20, 50):
        share = right / n
        centre, half = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        want = [(centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)]
        got = intervals.score_interval(np.array([1.0] * right + [0.0] * (n - right)))
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_the_interval_of_partial_scores_is_resampled():
    scores = np.random.default_rng(0).choice([0.0, 0.5, 1.0], 1000)
    low, high = intervals.score_interval(scores)
    half = 1.96 * scores.std() / np.sqrt(1000)
    np.testing.assert_allclose([low, high], [scores.mean() - half, scores.mean() + half], atol=0.003)


def test_accuracy_is_of_whole_answers_overall_and_per_kind():
    answers = vqa.Answers(
        ['yes', 'no', 'circle', 'red', 'yes', 'circles'], ['yes', 'yes', 'circle', 'blue', 'no', 'circle']
    )
    assert answers.accuracy(easy_vqa.kind_of) == {'overall': 2 / 6, 'yes/no': 1 / 3, 'shape': 1 / 2, 'colour': 0}
    assert vqa.Answers(['Yes'], ['yes']).accuracy(easy_vqa.kind_of) == {
        'overall': 1,
        'yes/no': 1,
    }  # no kind that was not asked


class FirstLetter:
    """Half a point for the right first letter, a whole one for the right answer."""

    title = 'first letter'

    def __call__(self, predicted, reference):
        return 0.5 * (predicted[:1] == reference[:1]) + 0.5 * (predicted == reference)


def test_accuracy_averages_the_scores_of_any_metric():
    answers = vqa.Answers(['yes', 'no', 'circus'], ['yes', 'yes', 'circle'])
    assert answers.scores(FirstLetter()).tolist() == [1.0, 0.0, 0.5]
    assert answers.accuracy(easy_vqa.kind_of, FirstLetter()) == {'overall': 0.5, 'yes/no': 0.5, 'shape': 0.5}
    assert isinstance(FirstLetter(), Metric)


def test_exact_match_is_a_registered_metric():
    metric = METRICS.find('exact_match')
    assert metric.title == 'accuracy'
    assert vqa.Answers(['Yes', 'no'], ['yes', 'yes']).scores(metric).tolist() == [1.0, 0.0]
    with pytest.raises(UnknownNameError, match="metric 'exact': expected one of exact_match"):
        METRICS.find('exact')


def test_the_blind_floor_answers_as_training_mostly_did():
    train = [('what?', a) for a in ('red', 'blue', 'blue')] + [('is it?', 'no'), ('which?', 'teal')]
    test = [('what?', 'red'), ('what?', 'blue'), ('is it?', 'no'), ('never asked?', 'yes')]
    floor = vqa.blind_floor(train, test)
    assert floor.predicted == ['blue', 'blue', 'no', 'blue']
    assert floor.true == ['red', 'blue', 'no', 'yes']


def test_a_sample_is_the_same_for_every_model():
    drawn = vqa.sample(50, 1000, seed=3)
    assert drawn == sorted(set(drawn)) == vqa.sample(50, 1000, seed=3)
    assert len(drawn) == 50
    assert drawn != vqa.sample(50, 1000, seed=4)
    assert vqa.sample(50, 20, seed=3) == list(range(20))


INDICES = [3, 500, 4000, 9000, 7777]


@pytest.fixture(scope='module')
def evaluate(tiny_blip2, easy_vqa_builder):
    """`evaluate(indices, records=..., **options)` of the tiny model; `evaluate.source` are the test records."""
    model, params = tiny_blip2
    processor, text = embedded.load_processor(model.cfg), TextFormat()
    test = easy_vqa.load(Path(easy_vqa_builder.data_dir).parents[1]).test
    source = test.source

    def run(indices, records=source, **options):
        split = Split(records, test.read_texts)
        return vqa.evaluate(model, params, processor, text, split, indices, max_new_tokens=4, **options)

    run.source = source
    return run


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch(evaluate):
    done = []
    two, three = (evaluate(INDICES, batch=batch, progress=done.append) for batch in (2, 3))
    assert two == three
    assert len(set(two.predicted)) > 1
    assert two.true == [evaluate.source[index]['answer'] for index in INDICES]
    assert done == [2, 4, 5, 3, 5]


@pytest.mark.slow
def test_an_evaluation_that_was_cut_off_goes_on_after_its_last_whole_batch(evaluate, tmp_path):
    file = tmp_path / 'answers.jsonl'
    done = []
    whole = evaluate(INDICES, batch=2)
    assert evaluate(INDICES, batch=2, answers_file=file) == whole
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    file.write_text(''.join(lines[:3]) + lines[3][:-2])  # killed while the second batch was being written
    assert evaluate(INDICES, batch=2, answers_file=file, progress=done.append) == whole
    assert done == [4, 5]
    assert file.read_text() == ''.join(lines)


@pytest.mark.parametrize('threads', [1, 4])
def test_records_are_read_once_in_order_and_ahead_of_the_answers(evaluate, monkeypatch, threads):
    """Several threads may begin records in another order; their answers are in that of the questions."""
    read = []

    class Records:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            if index == 4:
                raise DataError('image 4 is missing')
            read.append(index)
            return {'image': index, 'question': 'q', 'answer': 'a'}

    monkeypatch.setattr(vqa, 'question_example', lambda processor, text, image, question: {'i': np.int32([image])})
    monkeypatch.setattr(
        vqa, 'answer_examples', lambda *arguments, **decoding: [str(example['i'][0]) for example in arguments[3]]
    )
    assert evaluate([3, 1, 2], Records(), batch=2, threads=threads).predicted == ['3', '1', '2']
    assert sorted(read) == [1, 2, 3]
    if threads == 1:
        assert read == [3, 1, 2]
    done = []
    with pytest.raises(DataError, match='image 4 is missing'):
        evaluate([0, 1, 2, 4], Records(), batch=2, threads=threads, progress=done.append)
    assert done == [2]  # the batch before it is answered


@pytest.mark.slow
def test_shuffled_images_are_those_of_the_questions_half_the_list_on(evaluate):
    source, others = evaluate.source, INDICES[2:] + INDICES[:2]
    moved = [source[a] | {'image': source[b]['image']} for a, b in zip(INDICES, others, strict=True)]
    assert evaluate(INDICES, batch=3, shuffle_images=True) == evaluate(range(5), moved, batch=3)


@pytest.mark.slow
def test_beams_answer_too(evaluate):
    assert len(evaluate(INDICES[:2], batch=2, num_beams=3, length_penalty=-1.0).predicted) == 2


def sparse_tree():
    """Kernels with zeros at random, so that some groups break the pattern."""
    rng = np.random.default_rng(0)
    q, mlp = (rng.normal(size=shape) * (rng.random(shape) < 0.6) for shape in ((2, 8, 6), (2, 4, 10)))
    kernels = {'attn': {'q': {'kernel': q, 'bias': np.zeros((2, 6))}}, 'mlp': {'kernel': mlp}}
    tree = {'language': {'blocks': kernels, 'head': {'kernel': np.ones((6, 9))}}}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree), q, mlp


def test_sparsity_of_a_tower_is_counted_over_its_blocks():
    tree, q, mlp = sparse_tree()
    kept = (np.count_nonzero(q) + np.count_nonzero(mlp)) / (q.size + mlp.size)
    counts = {'weights': q.size + mlp.size, 'density': kept}
    assert density.tower_sparsity(tree, 'language', 'dense') == {'pattern': 'dense', 'violations': 0} | counts
    groups = np.concatenate([np.moveaxis(k, 1, -1).reshape(-1, 4) for k in (q, mlp)])
    wrong = sum(np.count_nonzero(group) != 2 for group in groups)
    assert density.tower_sparsity(tree, 'language', '2:4') == {'pattern': '2:4', 'violations': wrong} | counts
    columns = [column for k in (q, mlp) for layer in k for column in layer.T]
    wrong = sum(np.count_nonzero(column) != len(column) // 2 for column in columns)
    assert density.tower_sparsity(tree, 'language', 0.5)['violations'] == wrong
    layers = density.layer_density(tree, 'language')
    for path, kernel in {'attn/q/kernel': q, 'mlp/kernel': mlp}.items():
        np.testing.assert_allclose(layers.pop(f'language/blocks/{path}'), (kernel != 0).mean((1, 2)), rtol=1e-6)
    assert not layers


def test_zeros_that_were_allocated_are_no_violations():
    kernel = jnp.ones((2, 4, 2)).at[0, 0].set(0.0).at[1, :3].set(0.0)  # 2 and 6 zeros
    tree = {'language': {'blocks': {'q': {'kernel': kernel}}}}

    def violations(zeros):
        given = {'language/blocks/q/kernel': np.array(zeros)}
        return density.tower_sparsity(tree, 'language', 0.5, zeros=given)['violations']

    assert density.tower_sparsity(tree, 'language', 0.5)['violations'] == 4  # every output of both layers
    assert [violations([2, 6]), violations([2, 5]), violations([4, 4])] == [0, 1, 4]


def test_plain_lora_would_fill_the_zeros_of_the_kernels_it_adapts():
    tree, q, mlp = sparse_tree()
    rules = [('language/blocks/.*', '2:4'), ('.*', 'dense')]
    params, masks = sl.prune_tree(tree, None, rules, method=sl.Magnitude())
    blocks, size = params['language']['blocks'], q.size + mlp.size
    kept_q, kept_mlp = np.count_nonzero(blocks['attn']['q']['kernel']), np.count_nonzero(blocks['mlp']['kernel'])
    untrained = sl.init_lora(jax.random.key(0), params, [('.*/q/kernel', sl.LoraSpec(2, 4)), ('.*', None)])
    assert density.plain_lora_density(params, masks, untrained) == (kept_q + kept_mlp) / size
    trained = jax.tree.map(jnp.ones_like, untrained)  # fills q, leaves the rest
    assert density.plain_lora_density(params, masks, trained) == (q.size + kept_mlp) / size
    assert density.plain_lora_density(params, {}, {}) == 1


def test_perplexity_equals_torch(from_torch, perturbed):
    cfg = llama.LlamaConfig(vocab=48, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24)
    tokens = np.random.default_rng(0).integers(0, 48, 55)
    oracle = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
            rms_norm_eps=cfg.norm_eps,
            tie_word_embeddings=True,
        )
    )
    oracle = perturbed(oracle)
    params = from_torch(oracle.state_dict(), llama.keys(cfg), llama.shapes(cfg), 'model.')
    windows = torch.asarray(tokens[:48].reshape(3, 16))  # the last seven tokens fill no window
    with torch.no_grad():
        want = float(torch.exp(oracle(windows, labels=windows).loss))
    assert perplexity(params, cfg, tokens, window=16) == pytest.approx(want, rel=1e-4)
    masked = sl.prune_tree(params, None, [('.*', '2:4')], method=sl.Magnitude())[1]
    bound = perplexity(sl.bind(params, masked), cfg, tokens, window=16)
    assert bound == pytest.approx(perplexity(sl.merge(params, masked), cfg, tokens, window=16), rel=1e-6)
    losses = window_losses(params, cfg, tokens, window=16)
    assert len(losses) == 3
    assert np.exp(np.mean(losses)) == pytest.approx(want, rel=1e-4)
    assert window_losses(params, cfg, tokens[16:], window=16) == pytest.approx(losses[1:], rel=1e-5)
    with pytest.raises(ValueError, match='55 tokens, fewer than one window of 128'):
        perplexity(params, cfg, tokens)


def test_a_score_that_is_none_is_refused():
    class Broken:
        title = 'broken'

        def __init__(self, value):
            self.value = value

        def __call__(self, predicted, reference):
            if self.value == 'raise':
                raise KeyError(predicted)
            return self.value

    for value, message in ((None, 'fails on'), (float('nan'), 'returns nan'), (2, 'returns 2'), ('raise', 'KeyError')):
        with pytest.raises(MetricError, match=f"metric 'broken' .*{message}"):
            vqa.Answers(['yes'], ['no']).scores(Broken(value))


@pytest.mark.parametrize(
    'line', [b'{', b'3', b'null', b'\xff"', b'', b'"b"', b'[3, "x"]', b'["b", "0123456789abcdef"]']
)
def test_a_damaged_file_of_answers_is_named_and_kept(tmp_path, line):
    file = tmp_path / 'answers.jsonl'
    lines = [line.encode() for line in vqa._AnswerLines('me').following(list('abcd'))]
    before = b''.join([lines[0], line + b'\n', *lines[2:]])
    file.write_bytes(before)
    message = 'damaged, or an answer of another run, with another batch, prompt or decoding; delete the'
    with pytest.raises(StorageError, match=f'answers.jsonl, line 2: {message}'):
        vqa._read_answers(file, 2, 'me')
    assert file.read_bytes() == before


def test_answers_that_were_changed_swapped_or_are_of_another_run_are_named(tmp_path):
    file = tmp_path / 'answers.jsonl'
    lines = vqa._AnswerLines('me').following(list('abcd'))
    file.write_text(''.join(lines))
    assert vqa._read_answers(file, 2, 'me') == list('abcd')
    for other, number in ((vqa._AnswerLines('you').following(list('abcd')), 1), ([lines[1], lines[0], *lines[2:]], 1)):
        file.write_text(''.join(other))
        with pytest.raises(StorageError, match=f'line {number}: '):
            vqa._read_answers(file, 2, 'me')
    file.write_text(''.join(lines).replace('"c"', '"e"'))
    with pytest.raises(StorageError, match='line 3: '):
        vqa._read_answers(file, 2, 'me')
