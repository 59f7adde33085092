"""The report of a run whose stages only pretend: texts of users stay texts, and a metric of one's own is shown."""

import re

import numpy as np
import pytest
from test_job import tiny_config

import sparselora_jax as sl
from sparselora_jax.data import easy_vqa
from sparselora_jax.data.dataset import Dataset, Split
from sparselora_jax.jobs import report
from sparselora_jax.jobs.job import Job
from sparselora_jax.runtime import digests, files
from sparselora_jax.sparse.patterns import PatternError

HOSTILE = '<script>alert("&")</script>'


class FirstLetter:
    """Half a point for the right first letter, a whole one for the right answer."""

    title = 'letters <right>'

    def __call__(self, predicted, reference):
        return 0.5 * (predicted[:1] == reference[:1]) + 0.5 * (predicted == reference)


FIRST_LETTER = FirstLetter()


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """`finished(name, answers, **fields)`: a job in the folder `name`, with these answers of every model."""

    def finish(name, answers, **fields):
        workdir = tmp_path / name
        workdir.mkdir(parents=True)
        image = np.zeros((64, 64, 3), np.uint8)
        records = [{'image': image, 'question': f'what is {answer}?', 'answer': answer} for answer in answers]
        split = Split(records, lambda: [(record['question'], record['answer']) for record in records])
        monkeypatch.setattr(easy_vqa, 'load', lambda data_dir: Dataset(split, split, ('all',), lambda answer: 'all'))
        cost = {'seconds': 1.0, 'peak_memory_bytes': 2**30}
        for model, score in {'dense': 1.0, 'pruned': 0.25, 'restored': 0.75}.items():
            write(
                workdir,
                f'evaluate_{model}',
                cost
                | {'accuracy': {'overall': score, 'all': score}, 'indices': list(range(len(answers)))}
                | {'predicted': [f'{answer[:1]}{model}' for answer in answers], 'true': answers},
            )
        write(workdir, 'floor', cost | {'accuracy': {'overall': 0.1, 'all': 0.1}})
        write(workdir, 'prune', cost)
        write(workdir, 'restore', cost | {'step_s': 0.5, 'steps_s': 2.0})
        sparsity = {'language': {'pattern': '2:4', 'density': 0.5, 'violations': 0}}
        densities = {'language': {'language/blocks/attn/q/kernel': [0.5, 0.5]}}
        sizes = {'dense': 10**6, 'exported': 10**6}
        write(workdir, 'export', cost | {'sparsity': sparsity, 'layer_density': densities, 'bytes': sizes})
        job = Job(tiny_config(**fields), workdir)
        files.write_text(workdir / 'config.json', job.config.to_json())
        for step in (1, 2):
            job.log.scalars('restore', step, {'loss': 1.0 / step})
        return job

    return finish


def write(workdir, name, result):
    files.write_text(workdir / f'{name}.json', digests.stamp(result | {'files': {}}))


def test_texts_of_users_are_text_in_the_page(finished):
    job = finished(f'run {HOSTILE.replace("/", "")}', [HOSTILE, 'yes', 'no'], data_dir=HOSTILE)
    report.write(job)
    page = (job.workdir / 'report.html').read_text()
    assert '<script' not in page
    assert page.count('&lt;script&gt;') >= 1 + 2 * 4 + 1  # title, question and true answer of the first cards, config
    assert page.count('<svg') == 2


def test_a_page_shows_every_figure_of_the_report(finished):
    job = finished('run', ['yes', 'no', 'circle'])
    got = report.write(job)
    text = re.sub(r'<[^>]*>', ' ', (job.workdir / 'report.html').read_text())
    assert got['won_back'] == pytest.approx(2 / 3)
    assert '3 test questions, answers generated greedily. Won back: 67% of what pruning lost.' in text
    for part in ('Accuracy by kind of answer', '25.0%', 'image-blind floor', '2:4', '0.5000', '0.50 s', '1.00 GiB'):
        assert part in text
    assert report.summary(got).splitlines()[0] == 'dense     accuracy  100.0%'


def test_a_metric_of_ones_own_scores_the_report_and_gives_it_its_title(finished):
    job = finished('run', ['yes', 'no', 'circle'], **{'evaluate.metric': f'{__name__}:FIRST_LETTER'})
    got = report.write(job)
    assert got['metric'] == 'letters <right>'
    low, high = got['intervals']['restored - dense']
    assert (low, high) == (0.0, 0.0)  # half a point for each answer of both
    assert 'Letters &lt;right&gt; by kind of answer' in (job.workdir / 'report.html').read_text()
    assert 'letters <right>' in report.summary(got)


def test_missing_zeros_are_an_error_that_names_the_tower(finished):
    got = report.write(finished('run', ['yes', 'no']))
    report.check_zeros(got, 'run')
    got['sparsity']['vision'] = {'pattern': '0.5', 'density': 0.6, 'violations': 17732}
    with pytest.raises(PatternError, match=r'^run: 17,732 groups of the tower vision do not have the zeros of their'):
        report.check_zeros(got, 'run')


def test_a_damaged_result_is_named_and_an_old_report_is_not_read(finished):
    job = finished('run', ['yes', 'no'])
    (job.workdir / 'report.json').write_text('{')
    report.write(job)
    for damaged in ('{', '[]', '"text"'):
        (job.workdir / 'evaluate_dense.json').write_text(damaged)
        with pytest.raises(sl.StorageError, match=r'evaluate_dense.json: not .*; delete it, and run the job again'):
            report.write(job)
