"""Accuracy on visual questions: answers are generated, then compared as text."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sparselora_jax.data import easy_vqa, pipeline
from sparselora_jax.generate import greedy
from sparselora_jax.models import blip2
from sparselora_jax.storage import write_text


class Answers(NamedTuple):
    """Generated and true answers of the same questions, in order."""

    predicted: list[str]
    true: list[str]

    @property
    def correct(self) -> np.ndarray:
        """True where the whole answer is right."""
        return np.array([p == t for p, t in zip(self.predicted, self.true, strict=True)])

    def accuracy(self) -> dict[str, float]:
        """Share of right answers: overall and per kind of answer."""
        kinds = np.array([easy_vqa.kind_of(answer) for answer in self.true])
        by_kind = {kind: float(self.correct[kinds == kind].mean()) for kind in easy_vqa.KINDS if (kinds == kind).any()}
        return {'overall': float(self.correct.mean())} | by_kind


_embed = jax.jit(blip2.embed, static_argnames='cfg')


def generate_answers(
    weights: dict,
    cfg: blip2.Blip2Config,
    batch: dict,
    tokenizer: Any,
    *,
    prompt_tokens: int,
    max_new_tokens: int = 4,
) -> list[str]:
    """Greedy answers to a batch of `image`, `tokens`, `valid`; only the first `prompt_tokens` slots are read."""
    prompt = {'image': batch['image']} | {name: batch[name][:, :prompt_tokens] for name in ('tokens', 'valid')}
    x, valid = _embed(weights, cfg, prompt)
    eos = tokenizer.eos_token_id
    new = greedy(weights['language'], cfg.language, x, valid, max_new_tokens=max_new_tokens, eos=eos)
    return [text.strip() for text in tokenizer.batch_decode(np.asarray(new), skip_special_tokens=True)]


def evaluate(
    weights: dict,
    cfg: blip2.Blip2Config,
    source: Any,
    indices: Sequence[int],
    tokenizer: Any,
    text: pipeline.TextFormat,
    *,
    batch: int = 50,
    max_new_tokens: int = 4,
    shuffle_images: bool = False,
    kept: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Answers the questions `indices` of `source`.

    Args:
      shuffle_images: each question gets the image of the question half the list further on; what is then still right
        is the image-blind floor.
      kept: a file of the answers so far, a line each: an evaluation that was cut off goes on after them.
    """
    transform = pipeline.vqa_transform(tokenizer, text)
    predicted = _read_answers(kept, batch)
    true = [source[index]['answer'].decode() for index in indices[: len(predicted)]]
    for first in range(len(predicted), len(indices), batch):
        records = [source[index] for index in indices[first : first + batch]]
        true += [record['answer'].decode() for record in records]
        if shuffle_images:
            others = [indices[(first + i + len(indices) // 2) % len(indices)] for i in range(len(records))]
            records = [r | {'image': source[other]['image']} for r, other in zip(records, others, strict=True)]
        # The last batch is filled up, so that one shape is compiled.
        rows = [transform(record) for record in records]
        rows += rows[-1:] * (batch - len(rows))
        stacked = {name: np.stack([row[name] for row in rows]) for name in ('image', 'tokens', 'valid')}
        shape = {'prompt_tokens': text.prompt_tokens, 'max_new_tokens': max_new_tokens}
        new = generate_answers(weights, cfg, stacked, tokenizer, **shape)[: len(records)]
        predicted += new
        if kept is not None:
            with kept.open('a') as file:
                file.writelines(json.dumps(answer) + '\n' for answer in new)
        progress(len(predicted))
    return Answers(predicted, true)


def _read_answers(kept: Path | None, batch: int) -> list[str]:
    """The whole batches of answers in a file; what a killed process left behind them is cut off."""
    if kept is None or not kept.exists():
        return []
    lines = [line for line in kept.read_text().splitlines(keepends=True) if line.endswith('\n')]
    lines = lines[: len(lines) // batch * batch]
    write_text(kept, ''.join(lines))
    return [json.loads(line) for line in lines]


def blind_floor(train: Sequence[tuple[str, str, int]], test: Sequence[tuple[str, str, int]]) -> Answers:
    """What a model that never sees an image can reach: the most frequent training answer of each question."""
    counts: dict[str, dict[str, int]] = {}
    for question, answer, _ in train:
        of_question = counts.setdefault(question, {})
        of_question[answer] = of_question.get(answer, 0) + 1
    guess = {question: max(sorted(answers), key=answers.get) for question, answers in counts.items()}
    return Answers([guess.get(question, 'yes') for question, _, _ in test], [answer for _, answer, _ in test])


def sample(count: int, total: int, *, seed: int) -> list[int]:
    """`count` of `total` questions, the same ones for every model; all of them if `count` is not smaller."""
    if count >= total:
        return list(range(total))
    return sorted(np.random.default_rng(seed).choice(total, count, replace=False).tolist())
