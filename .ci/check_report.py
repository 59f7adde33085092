"""Check the figures of a run's report against the claims of the README."""

import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text())
scores, intervals = report['scores'], report['intervals']
kinds, language = report['scores_by_kind']['dense'], report['sparsity']['language']
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
checks = {
    'every key is present': report.keys() >= set(KEYS) and report['time_s'].keys() >= {'evaluate', 'prune', 'restore'},
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
for what, holds in checks.items():
    print('holds' if holds else 'BROKEN', '|', what)
sys.exit(not all(checks.values()))
