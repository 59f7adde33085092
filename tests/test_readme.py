"""What the README shows runs, and prints what it says."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / 'README.md'


def test_library_example_runs(capsys):
    (example,) = (e for e in re.findall(r'```python\n(.*?)```', README.read_text(), re.S) if 'print(' in e)
    exec(compile(example, str(README), 'exec'), {})
    said = re.search(r'print\(.*\)  # (.*)', example).group(1)
    assert capsys.readouterr().out.strip() == said
