"""Time the VQA accuracy of as many answers as VQAv2's validation split has: 214,354 questions with 10 references.

python benchmarks/score.py [--questions=214354]

The answers are made up: 100,000 different texts, the most frequent ones in most questions, as annotators answer. They
pass through JSON, because a reader of annotation files creates a new string for each answer. `plain loop` is ten
million additions in Python: divide by it to compare machines. `without memory` is the time of the official rule if each
text is normalised whenever it occurs, estimated from a tenth of the questions.

Two busy cores: plain loop 2.3 s; official 7.5 s (3.3 plain loops), lavis 3.6 s, evalai 2.5 s. Two slow, busy cores, two
runs: plain loop 2.4 and 3.4 s; official 7.3 and 11.1 s (3.0 and 3.2 plain loops), lavis 4.3 and 9.4 s, evalai 3.9 and
6.5 s; official without memory 66 and 67 s; the means of a bootstrap sample 36 and 35 ms.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from sparselora_jax.evaluation.metrics.answer_text import official_text, strip_lines
from sparselora_jax.evaluation.metrics.vqa_accuracy import RULES, leave_one_out, vqa_accuracy

QUESTIONS = 214_354
REFERENCES = 10
TEXTS = 100_000
ADDITIONS = 10_000_000
SAMPLES = 20  # bootstrap samples
WORDS = ('red', 'two', 'the', 'dog', 'T-shirt', "don't", '1,000', 'street', 'a', 'skateboard', 'U.S.', 'wont', 'yes')


def draw_answers(questions: int) -> tuple[list[str], list[list[str]], dict[str, list[str]]]:
    """Return predictions, references and groups."""
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(WORDS), (TEXTS, 3))
    texts = [' '.join(WORDS[word] for word in row) + f' {number}' for number, row in enumerate(picked)]
    # A few texts are very frequent. Most annotators of a question give the same answer.
    true = np.minimum(rng.zipf(1.2, (questions, 1)), TEXTS) - 1
    other = np.minimum(rng.zipf(1.2, (questions, REFERENCES + 1)), TEXTS) - 1
    drawn = np.where(rng.random((questions, REFERENCES + 1)) < 0.7, true, other)
    answers = json.loads(json.dumps([[texts[number] for number in row] for row in drawn]))
    groups = {
        'answer_type': rng.choice(['yes/no', 'number', 'other'], questions).tolist(),
        'question_type': rng.choice([f'type {number}' for number in range(65)], questions).tolist(),
    }
    return [row[0] for row in answers], [row[1:] for row in answers], groups


def plain_loop() -> int:
    """Add in Python, to compare machines."""
    total = 0
    for number in range(ADDITIONS):
        total += number
    return total


def score_without_memory(predictions: list[str], references: list[list[str]]) -> list[float]:
    """Score by the official rule, and normalise each text whenever it occurs."""
    scores = []
    for prediction, answers in zip(predictions, references, strict=True):
        predicted = strip_lines(prediction)
        stripped = [strip_lines(answer) for answer in answers]
        if len(set(stripped)) > 1:
            predicted = official_text(predicted)
            stripped = [official_text(answer) for answer in stripped]
        scores.append(leave_one_out(stripped.count(predicted), len(stripped)))
    return scores


def seconds(run: Callable[[], object]) -> float:
    """Return the time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    """Print a line for each time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--questions', type=int, default=QUESTIONS)
    arguments = parser.parse_args()
    predictions, references, groups = draw_answers(arguments.questions)
    loop = min(seconds(plain_loop) for _ in range(3))
    print(f'plain loop        {loop:7.2f} s')
    for rule in RULES:
        taken = seconds(lambda rule=rule: vqa_accuracy(predictions, references, rule=rule, groups=groups))
        print(f'{rule:<17} {taken:7.2f} s, {taken / loop:.1f} plain loops')
    tenth = max(1, arguments.questions // 10)
    taken = seconds(lambda: score_without_memory(predictions[:tenth], references[:tenth]))
    print(f'without memory    {taken * arguments.questions / tenth:7.2f} s')
    result = vqa_accuracy(predictions, references, groups=groups)
    assert score_without_memory(predictions[:tenth], references[:tenth]) == result.per_item[:tenth].tolist()
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, arguments.questions, arguments.questions) for _ in range(SAMPLES)]
    taken = seconds(lambda: [result.aggregate(sample) for sample in samples])
    print(f'bootstrap sample  {1000 * taken / SAMPLES:7.2f} ms')


if __name__ == '__main__':
    main()
