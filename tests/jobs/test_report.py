"""The report of a run whose stages only pretend: texts of users stay texts, and a metric of one's own is shown."""

import html
import json
import re

import numpy as np
import pytest
from test_job import tiny_config

import sparselora_jax as sl
from sparselora_jax.data import easy_vqa
from sparselora_jax.data.dataset import Dataset, Split
from sparselora_jax.evaluation import intervals
from sparselora_jax.jobs import environment, report
from sparselora_jax.jobs.job import Job
from sparselora_jax.runtime import files

HOSTILE = '<script>alert("&")</script>'


class FirstLetter:
    """Half a point for the right first letter, a whole one for the right answer."""

    title = 'letters <right>'

    def __call__(self, predicted, reference):
        return 0.5 * (predicted[:1] == reference[:1]) + 0.5 * (predicted == reference)


FIRST_LETTER = FirstLetter()


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """`finished(name, answers, layers, violations, **fields)`: a job in the folder `name`, with these answers."""

    def finish(name, answers, layers=(0.5, 0.5), violations=0, **fields):
        workdir = tmp_path / name
        workdir.mkdir(parents=True)
        image = np.zeros((64, 64, 3), np.uint8)
        records = [{'image': image, 'question': f'what is {answer}?', 'answer': answer} for answer in answers]
        split = Split(records, lambda: [(record['question'], record['answer']) for record in records])
        monkeypatch.setattr(easy_vqa, 'load', lambda data_dir: Dataset(split, split, ('all',), lambda answer: 'all'))
        cost = {'seconds': 1.0, 'peak_memory_bytes': 2**30}
        job = Job(tiny_config(**fields), workdir)
        for model, score in {'dense': 1.0, 'pruned': 0.25, 'restored': 0.75}.items():
            losses = {'perplexity': 20.0, 'window_losses': [2.9 + score, 3.1 + score, 3.0 + score]}
            write(
                job,
                f'evaluate_{model}',
                cost
                | losses
                | {'accuracy': {'overall': score, 'all': score}, 'indices': list(range(len(answers)))}
                | {'predicted': [f'{answer[:1]}{model}' for answer in answers], 'true': answers},
            )
        write(job, 'floor', cost | {'accuracy': {'overall': 0.1, 'all': 0.1}})
        write(job, 'prune', cost)
        write(job, 'restore', cost | {'step_s': 0.5, 'steps_s': 2.0})
        counts = {'pattern': '2:4', 'weights': 64, 'density': 0.5, 'violations': violations}
        sparsity = {'language': counts, 'vision': counts | {'pattern': 'dense', 'density': 1.0, 'violations': 0}}
        densities = {
            'language': {'language/blocks/attn/q/kernel': list(layers), 'language/blocks/mlp/up/kernel': [0.5, 0.5]},
            'vision': {'vision/blocks/attn/q/kernel': [1.0, 1.0 - 1e-6]},
        }
        sizes = {'dense': 10**6, 'exported': 10**6}
        write(job, 'export', cost | {'sparsity': sparsity, 'layer_density': densities, 'bytes': sizes})
        files.write_text(workdir / 'config.json', job.config.to_json())
        for step in (1, 2):
            job.log.scalars('restore', step, {'loss': 1.0 / step})
        return job

    return finish


def write(job, stage, result):
    job.stored.write_result(stage, result)


def test_texts_of_users_are_text_in_the_page(finished):
    job = finished(f'run {HOSTILE.replace("/", "")}', [HOSTILE, 'yes', 'no'], data_dir=HOSTILE)
    report.write(job)
    page = (job.workdir / 'report.html').read_text()
    assert '<script' not in page
    assert page.count('&lt;script&gt;') >= 1 + 2 * 4 + 1  # title, question and true answer of the first cards, config
    assert page.count('<svg') == 1  # the losses; layers do not differ


def test_a_page_shows_every_figure_of_the_report(finished):
    job = finished('run', ['yes', 'no', 'circle'])
    got = report.write(job)
    text = re.sub(r'<[^>]*>', ' ', (job.workdir / 'report.html').read_text())
    assert got['won_back'] == pytest.approx(2 / 3)
    assert '3 test questions, answers generated greedily.' in text
    assert 'Won back: 67% of the accuracy that pruning lost.' in text
    for part in ('Accuracy by kind of answer', '25.0%', 'image-blind floor', '2:4', '0.5000', '0.50 s', '1.00 GiB'):
        assert part in text
    for word in ('Dense: ', 'Restored: ', 'Image-blind floor: ', 'qformer is ', 'Density is ', 'Violations are '):
        assert word in text
    for part in ('zeros in the blocks 25.0% language 2:4 0 groups', '1.00 MB dense: 1.00 MB; zeros are stored'):
        assert part in ' '.join(text.split())
    assert report.summary(got).splitlines()[0] == 'dense     accuracy  100.0%   perplexity     20.0'


def test_a_metric_of_ones_own_scores_the_report_and_gives_it_its_title(finished):
    job = finished('run', ['yes', 'no', 'circle'], **{'evaluate.metric': f'{__name__}:FIRST_LETTER'})
    got = report.write(job)
    assert got['metric'] == 'letters <right>'
    low, high = got['intervals']['restored - dense']
    assert (low, high) == (0.0, 0.0)  # half a point for each answer of both
    assert 'Letters &lt;right&gt; by kind of answer' in (job.workdir / 'report.html').read_text()
    assert 'letters <right>' in report.summary(got)


def test_a_damaged_result_is_named_and_an_old_report_is_not_read(finished):
    job = finished('run', ['yes', 'no'])
    (job.workdir / 'report.json').write_text('{')
    report.write(job)
    for damaged in ('{', '[]', '"text"'):
        (job.workdir / 'evaluate_dense.json').write_text(damaged)
        with pytest.raises(sl.StorageError, match=r'evaluate_dense.json: not .*; put back a copy; or delete'):
            report.write(job)


def test_figures_have_intervals(finished):
    got = report.write(finished('run', ['yes', 'no', 'circle']))
    assert got['score_intervals'].keys() == got['perplexity_intervals'].keys() == {'dense', 'pruned', 'restored'}
    assert got['intervals'].keys() == {'pruned - dense', 'restored - dense', 'restored - pruned'}
    low, high = got['perplexity_intervals']['dense']
    np.testing.assert_allclose(low * high, np.exp(4.0) ** 2)  # around exp(mean loss), on a log scale
    assert high / low > 1.5
    # The windows differ, but by the same in both models: the ratio is known far better than either perplexity.
    ratio = got['perplexity_ratios']['restored - pruned']
    np.testing.assert_allclose([ratio['ratio'], *ratio['interval']], np.exp(0.5), rtol=1e-6)


def test_a_perplexity_of_a_single_window_has_no_interval(finished):
    job = finished('run', ['yes', 'no', 'circle'])
    for model in ('dense', 'pruned', 'restored'):
        stage = job.read_result(f'evaluate_{model}')
        write(job, f'evaluate_{model}', stage | {'window_losses': [3.0]})
    got = report.write(job)
    assert got['perplexity']
    assert got['perplexity_intervals'] == got['perplexity_ratios'] == {}
    assert 'perplexity 20.0' in (job.workdir / 'report.html').read_text()


def test_densities_are_drawn_only_where_layers_differ(finished):
    alike = finished('alike', ['yes', 'no', 'circle'], layers=(0.5, 0.5))
    report.write(alike)
    page = (alike.workdir / 'report.html').read_text()
    assert page.count('<svg') == 1
    assert 'language: every kernel of every layer keeps 50.0% of its weights.' in page
    assert 'vision: every' not in page  # not pruned, but for a weight that is zero by itself
    by_kernel = finished('by_kernel', ['yes', 'no', 'circle'], layers=(0.3, 0.3))
    report.write(by_kernel)
    page = (by_kernel.workdir / 'report.html').read_text()
    assert page.count('<svg') == 1
    assert 'language: every layer keeps 30.0% of attn/q; 50.0% of mlp/up.' in page
    differing = finished('differing', ['yes', 'no', 'circle'], layers=(0.3, 0.7))
    report.write(differing)
    page = (differing.workdir / 'report.html').read_text()
    assert page.count('<svg') == 2
    assert 'language: every' not in page


def test_the_page_says_what_computed_the_run_and_how_to_repeat_it(finished):
    job = finished('a run', ['yes', 'no', 'circle'])
    described = environment.describe(job.config)
    for each in (described, described | {'devices': 8, 'platform': 'gpu', 'device_kind': 'H200'}):
        environment.record(job.stored, each)
    got = report.write(job)
    assert got['environments'] == environment.recorded(job.stored)
    assert got['versions'] == described['versions']
    text = html.unescape((job.workdir / 'report.html').read_text())
    assert '8 H200 devices' in text
    assert environment.devices(described) in text
    assert f"python launch/train.py --config='{job.workdir}/config.json' --workdir=NEW_FOLDER" in text


def task_result(right, **fields):
    """What a model reached in a task of four items, which it answered rightly or wrongly."""
    mean = 100 * np.mean(right)
    values = {'accuracy': mean, 'accuracy/kind/<b>': mean}
    known = {'headline': 'accuracy', 'values': values, 'stderr': dict.fromkeys(values, 5.0)}
    return known | {'scored': 4, 'expected': 5046, 'notes': ['a note'], 'is_right': right, 'draws': [mean] * 3} | fields


RIGHT = {'dense': [1, 1, 1, 1], 'pruned': [1, 0, 0, 0], 'restored': [1, 1, 1, 0]}


def test_tasks_are_compared_side_by_side(finished):
    job = finished('run', ['yes', 'no', 'circle'])
    unscored = {'values': {}, 'stderr': {}, 'scored': 0, 'is_right': [], 'draws': []}
    for model, right in RIGHT.items():
        # CIDEr is no share of right captions: its interval is that of the paired draws.
        mean = 60 + 40 * np.mean(right)
        cider = {'headline': 'CIDEr', 'values': {'CIDEr': mean, 'BLEU-4': None}, 'stderr': {'CIDEr': 2.0}}
        tasks = {
            'ok_vqa_val2014': task_result(right),
            '/data/cats': task_result(right, **cider, is_right=[], draws=[mean - 1, mean, mean + 1]),
            'vqav2_test': task_result(right, **unscored),
        }
        write(job, f'tasks_{model}', {'seconds': 1.0, 'peak_memory_bytes': 2**30, 'tasks': tasks})
    got = report.write(job)
    answers = got['tasks']['ok_vqa_val2014']
    assert answers['scores'] == {'dense': 100.0, 'pruned': 25.0, 'restored': 75.0}
    assert answers['won_back'] == pytest.approx(2 / 3)
    paired = intervals.paired_interval(np.array(RIGHT['restored'], float), np.array(RIGHT['dense'], float))
    np.testing.assert_allclose(answers['intervals']['restored - dense'], 100 * np.array(paired))
    # Both models have the same draws, so their difference has no spread.
    np.testing.assert_allclose(got['tasks']['/data/cats']['intervals']['restored - pruned'], (20.0, 20.0))
    assert got['tasks']['vqav2_test']['intervals'] == {}
    page = (job.workdir / 'report.html').read_text()
    text = ' '.join(re.sub(r'<[^>]*>', ' ', page).split())
    assert 'ok_vqa_val2014 accuracy 100.00 ± 5.00 25.00 ± 5.00 75.00 ± 5.00 4 of 5,046' in text
    assert 'cats -30.00 (-30.00 to -30.00) -10.00 (-10.00 to -10.00) +20.00 (+20.00 to +20.00) 67%' in text
    assert 'vqav2_test accuracy not scored not scored not scored' in text
    assert 'accuracy/kind/&lt;b&gt;' in page
    assert 'BLEU-4 none none none' in text
    assert page.count('<svg') == 2  # the losses and the tasks
    assert report.summary(got).splitlines()[3].split() == [
        *('ok_vqa_val2014', 'accuracy', 'dense', '100.00', 'pruned', '25.00', 'restored', '75.00', '4', 'items')
    ]


def test_without_tasks_the_page_has_no_part_about_them(finished):
    job = finished('run', ['yes', 'no', 'circle'])
    assert report.write(job)['tasks'] == {}
    assert 'Scores on tasks' not in (job.workdir / 'report.html').read_text()


@pytest.mark.slow
def test_a_broken_pattern_is_written_down_and_ends_the_script(finished, script):
    job = finished('run', ['yes', 'no', 'circle'], violations=7)
    job._inputs.store(job.stored)
    fields = ('prune.samples=8', 'prune.chunk=4', 'evaluate.questions=14', 'evaluate.batch=8', 'restore.steps=3')
    fields += ('restore.batch=4', 'restore.warmup=1', 'restore.checkpoint_every=2', 'data_dir=not read')
    code, out, err = script('train.py', f'--workdir={job.workdir}', *(f'--config.{field}' for field in fields))
    assert code == 1
    assert err.strip().endswith('Do not use the exported model; prune again in another workdir')
    assert '7 groups of the language tower break pattern 2:4' in err.splitlines()[-1]
    assert '7 violations' in out
    assert json.loads((job.workdir / 'report.json').read_text())['sparsity']['language']['violations'] == 7
    assert 'The exported model breaks its pattern' in (job.workdir / 'report.html').read_text()
