"""Progress is a bar in a terminal and plain lines elsewhere; what an earlier run has done is counted, not timed."""

import io
import re

import pytest

from sparselora_jax.runtime import progress
from sparselora_jax.runtime.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which a test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
    return now


def test_plain_lines_tell_rate_eta_and_note(clock):
    file = io.StringIO()
    report = Progress('restore', 300, interval=10, file=file)
    for done, seconds in ((1, 5), (2, 9.9), (20, 10), (100, 12), (220, 120), (300, 121)):
        clock[0] = 100.0 + seconds
        report(done, 'loss 1.0' if done > 20 else '')
    assert file.getvalue().splitlines() == [
        'restore 20/300 | 2.0 a second | ETA 2:20',
        'restore 220/300 | 1.8 a second | ETA 0:43 | loss 1.0',
        'restore 300/300 | 2.5 a second | ETA 0:00 | loss 1.0',
    ]


def test_plain_lines_do_not_time_what_was_done_before(clock):
    file = io.StringIO()
    report = Progress('restore', 100, first=90, interval=1, file=file)
    clock[0] += 10
    report(95)
    assert file.getvalue() == 'restore 95/100 | 2.00 s each | ETA 0:10\n'


def test_a_terminal_has_a_bar_that_begins_where_the_run_is_resumed():
    file = Terminal()
    report = Progress('restore', 100, first=30, file=file)
    report(31, 'loss 1.0')
    report(100, 'loss 0.5')
    begin, *_, end = [line for line in re.split('[\r\n]', file.getvalue()) if line.strip()]
    assert re.match(r'restore:\s+30%.* 30/100 \[00:00<\?', begin)
    assert re.match(r'restore: 100%.* 100/100 \[.*loss 0.5\]', end)
    assert file.getvalue().endswith('\n')
    assert report.bar.initial == 30  # the rate counts from there


def test_only_the_first_process_reports(monkeypatch):
    monkeypatch.setattr(progress.processes, 'first', lambda: False)
    for file in (Terminal(), io.StringIO()):
        Progress('restore', 2, interval=0, file=file)(2)
        assert file.getvalue() == ''
