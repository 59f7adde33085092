"""Check the figures of a run's report against the claims of the README."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEYS = [
    'scores',
    'intervals',
    'perplexity',
    'baselines',
    'sparsity',
    'time_s',
    'step_s',
    'peak_memory_bytes',
    'bytes',
    'config',
    'versions',
]
# How far a run may be from the README, in points of accuracy. Processors round differently, and a pruned model's
# answers depend on rounding far more than those of the other two.
TOLERANCES = {'dense': 1.0, 'pruned': 15.0, 'restored': 1.5}


def promised_scores(readme: str) -> dict[str, float]:
    """Return the accuracy of each model, in percent, from the README's lines that the demo prints."""
    return {name: float(score) for name, score in re.findall(r'^(\w+) +accuracy +([\d.]+)%', readme, re.M)}


def find_checks(report: dict, readme: str) -> dict[str, bool]:
    """Return whether each claim holds."""
    scores, intervals = report['scores'], report['intervals']
    kinds, language = report['scores_by_kind']['dense'], report['sparsity']['language']
    promised = promised_scores(readme)
    as_promised = {
        f'{name} accuracy is within {tolerance} points of the {promised[name]} % in the README': abs(
            100 * scores[name] - promised[name]
        )
        <= tolerance
        for name, tolerance in TOLERANCES.items()
    }
    return as_promised | {
        'every key is present': report.keys() >= set(KEYS)
        and report['time_s'].keys() >= {'evaluate', 'prune', 'restore'},
        'the gain of restoration is significant': intervals['restored - dense'][0] > intervals['pruned - dense'][1],
        'dense accuracy >= 95 %': scores['dense'] >= 0.95,
        'dense accuracy of each kind >= 90 %': min(kinds.values()) >= 0.90,
        '1000 questions or more': report['questions'] >= 1000,
        'pruning costs 10 points or more': scores['dense'] - scores['pruned'] >= 0.10,
        'restoration recovers 90 % or more': report['won_back'] >= 0.90,
        'language density is exactly 0.5, no violations': language['density'] == 0.5 and language['violations'] == 0,
        'merging plain LoRA would fill the zeros': report['baselines']['lora_merged_density'] > 0.9,
        'at most 8 GiB': report['peak_memory_bytes'] <= 8 * 2**30,
        'at most 15 minutes': sum(report['time_s'].values()) <= 900,
    }


def main(path: str) -> None:
    """Print every claim and whether it holds; exit with code 1 if one does not."""
    checks = find_checks(json.loads(Path(path).read_text()), (ROOT / 'README.md').read_text())
    for what, holds in checks.items():
        print('holds' if holds else 'BROKEN', '|', what)
    sys.exit(not all(checks.values()))


if __name__ == '__main__':
    main(sys.argv[1])
