"""A log is continued by the next run; of a step that was run twice, the last values count."""

import json

from sparselora_jax.jobs.log import Log


def test_a_log_is_continued_and_its_last_values_count(tmp_path):
    path = tmp_path / 'log.jsonl'
    path.write_text(json.dumps({'stage': 'restore', 'step': 1, 'loss': 3.0}) + '\n{"stage": "rest')
    log = Log(tmp_path)
    log.scalars('restore', 2, {'loss': 2.0})
    log.scalars('restore', 1, {'loss': 2.5})
    log.scalars('prune', 1, {'loss': 9.0})
    assert log.curve('restore', 'loss') == [(1, 2.5), (2, 2.0)]


def test_of_steps_run_twice_the_last_record_counts(tmp_path):
    log = Log(tmp_path)
    for step, loss in [(1, 3.0), (2, 2.0), (2, 1.5)]:
        log.scalars('restore', step, {'loss': loss})
    assert log.curve('restore', 'loss') == [(1, 3.0), (2, 1.5)]
    assert json.loads((tmp_path / 'log.jsonl').read_text().splitlines()[0])['loss'] == 3.0


def test_a_record_that_a_full_disk_cut_off_is_left_out(tmp_path):
    Log(tmp_path).scalars('restore', 1, {'loss': 3.0})
    with (tmp_path / 'log.jsonl').open('a') as file:
        file.write('{"stage": "rest')
    Log(tmp_path).scalars('restore', 2, {'loss': 2.0})
    assert Log(tmp_path).curve('restore', 'loss') == [(1, 3.0), (2, 2.0)]


def test_damaged_lines_are_counted_when_the_log_is_opened(tmp_path, capsys):
    Log(tmp_path).scalars('restore', 1, {'loss': 3.0})
    assert capsys.readouterr().err == ''
    (tmp_path / 'log.jsonl').write_bytes(b'\xff\xfe\x00\n{"stage"\n')
    assert Log(tmp_path).curve('restore', 'loss') == []
    assert 'the curves of the report lack: 2' in capsys.readouterr().err
