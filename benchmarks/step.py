"""One restoration step on SmolLM2: SparseLoRA exact, straight-through, plain LoRA; and the same formula in torch.

    python benchmarks/step.py

Every variant does the same work: SmolLM2's real weights, 2:4 magnitude masks, LoRA of rank 8 on every kernel of the
blocks, KD 0.1 against the unmasked base, AdamW, 16x32 tokens, the head at the last `--answers` positions. JAX is the
library's own `make_train_step`; torch is in `step_torch.py`. Before anything is timed, losses and gradient norms of the
two are compared over two steps. Then every round times a step of each variant and the matmuls of each library, in turn,
each after a call that is not timed; a figure is the median of the rounds. The matmul rate is the better of the two
shapes printed (the model's most frequent `x @ W`, and a large one), and a share is analytic FLOPs / seconds / the rate
of the same library.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from absl import app, flags
from step_torch import KD, LR, SCALE, TEMPERATURE, WEIGHT_DECAY, torch_variant
from timing import matmul_runs, seconds

import sparselora_jax as sl
from sparselora_jax.checkpoints import embedded, gguf
from sparselora_jax.models import llama
from sparselora_jax.restoration import restore

BATCH = flags.DEFINE_integer('batch', 16, 'sequences')
TOKENS = flags.DEFINE_integer('tokens', 32, 'tokens a sequence')
ANSWERS = flags.DEFINE_integer('answers', 32, 'last positions of a sequence that reach the head')
ROUNDS = flags.DEFINE_integer('rounds', 7, 'timed steps of each variant')
THREADS = len(os.sched_getaffinity(0))
RANK = 8
GRADIENTS = ('plain', 'straight_through', 'exact')


class Flops(NamedTuple):
    """What one step must compute, in floating-point operations."""

    forward: float  # student: base kernels, attention
    teacher: float
    dx: float  # backward to the activations
    head: float  # student, teacher, dx
    lora: float  # everything of rank r: A @ B, or x @ A @ B, and the gradients of A and B
    dw: float  # x^T g of every adapted kernel: the exact gradient alone


def count(cfg: llama.LlamaConfig, batch: int, tokens: int, answers: int, gradient: str) -> Flops:
    """Analytic FLOPs of a step; a matmul [m, k] @ [k, n] is 2mkn. Norms, softmax and the optimiser are not counted."""
    width, kv = cfg.width, cfg.kv_heads * cfg.head_dim
    shapes = [(width, width), (width, kv), (width, kv), (width, width)]
    shapes += [(width, cfg.mlp_width), (width, cfg.mlp_width), (cfg.mlp_width, width)]
    rows = batch * tokens
    base = cfg.depth * sum(2 * rows * k * n for k, n in shapes)
    attention = cfg.depth * 2 * (2 * batch * tokens * tokens * width)  # q k^T and its product with v
    low = cfg.depth * sum(2 * rows * RANK * (k + n) for k, n in shapes)  # x @ A, then @ B
    product = cfg.depth * sum(2 * k * RANK * n for k, n in shapes)  # A @ B, or dW @ B^T, or A^T @ dW
    lora = {
        'plain': 3 * low,  # forward; g @ B^T and its @ A^T into dx; dA and dB
        'straight_through': 2 * product + 2 * low,  # W + A @ B twice; x @ A and g @ B^T; dA and dB
        'exact': 4 * product,  # W + A @ B twice; dA and dB from dW
    }[gradient]
    head = 3 * 2 * batch * answers * width * cfg.vocab
    dw = base if gradient == 'exact' else 0
    return Flops(base + attention, base + attention, base + 2 * attention, head, lora, dw)


def setup() -> tuple[llama.LlamaConfig, dict, dict, dict, dict]:
    """(cfg, params, masks, lora, batch). B is not zero, or A would have no gradient to compare."""
    cfg, params = gguf.load_llama(embedded.language_model_file())
    _, masks = sl.prune_tree(params, None, [('blocks/.*', '2:4')], method=sl.Magnitude())
    lora = sl.init_lora(jax.random.key(0), params, [('blocks/.*', (RANK, SCALE * RANK))])
    lora = jax.tree.map(lambda x: x + 1e-3 * jax.random.normal(jax.random.key(1), x.shape), lora)
    tokens = jax.random.randint(jax.random.key(2), (BATCH.value, TOKENS.value + 1), 0, cfg.vocab)
    targets = tokens[:, -ANSWERS.value :]
    batch = {'tokens': tokens[:, :-1], 'targets': targets, 'answer': jnp.ones(targets.shape, bool)}
    return cfg, params, masks, lora, batch


def jax_step(gradient: str, cfg: llama.LlamaConfig, lora: dict) -> tuple[Callable, sl.State]:
    """The library's step and its first state."""

    def forward(w, batch):
        x = llama.embed_tokens(w, cfg, batch['tokens'])
        hidden = llama.forward(w, cfg, x, jnp.ones(batch['tokens'].shape, bool))
        return llama.head(w, cfg, hidden[:, -batch['targets'].shape[1] :])

    tx = optax.adamw(LR, weight_decay=WEIGHT_DECAY)
    step = restore.make_train_step(forward, tx, kd=KD, temperature=TEMPERATURE, gradient=gradient)
    return step, sl.init_state(jax.tree.map(jnp.copy, lora), tx)


def jax_variant(gradient: str, cfg, params, masks, lora, batch) -> Callable[[], tuple[float, float]]:
    """A function that runs the library's step once and returns (loss, gradient norm)."""
    step, state = jax_step(gradient, cfg, lora)

    def run():
        nonlocal state
        state, metrics = step(state, restore.Frozen(params, masks), batch)
        return float(metrics['loss']), float(metrics['grad_norm'])

    return run


def goals(
    flops: dict[str, float], times: dict[tuple, float], share: dict[tuple, float]
) -> list[tuple[str, float, float]]:
    """(what, figure, limit); the figure must not exceed the limit. Both are negative for a lower bound."""
    plain, through, exact = (times['jax', g] for g in GRADIENTS)
    ratio = flops['exact'] / flops['plain']
    return [
        ('exact / plain, over the FLOP ratio', exact / plain / ratio, 1.05),
        ('straight-through / plain', through / plain, 1.08),
        ('exact: torch / jax', -times['torch', 'exact'] / exact, -1.1),
        ('straight-through: torch / jax', -times['torch', 'straight_through'] / through, -1.1),
        *((f'{g}: share of the matmul rate', -share['jax', g], -0.85) for g in GRADIENTS),
    ]


def report(cfg: llama.LlamaConfig, times: dict[tuple, list[float]], rates: dict[tuple, list[float]]) -> None:
    """Print the matmul rates, the table, and whether each goal holds."""
    best = {}
    for (library, shape), values in rates.items():
        rate = float(np.median(values))
        best[library] = max(rate, best.get(library, 0))
        print(f'matmul {library:5} {"x".join(map(str, shape)):14} {rate / 1e9:6.0f} GFLOP/s')
    flops = {g: sum(count(cfg, BATCH.value, TOKENS.value, ANSWERS.value, g)) for g in GRADIENTS}
    median = {variant: float(np.median(values)) for variant, values in times.items()}
    share = {(library, g): flops[g] / t / best[library] for (library, g), t in median.items()}
    print('\n| step | seconds (min to max) | / plain | FLOPs / plain | torch / jax | share of matmul rate |')
    print('|---|---|---|---|---|---|')
    for (library, g), t in median.items():
        spread = f'{t:.2f} ({min(times[library, g]):.2f} to {max(times[library, g]):.2f})'
        faster = f'{median["torch", g] / t:.2f}' if library == 'jax' else ''
        plain = f'{t / median[library, "plain"]:.2f} | {flops[g] / flops["plain"]:.2f}'
        print(f'| {library} {g} | {spread} | {plain} | {faster} | {share[library, g]:.0%} |')
    print()
    for what, figure, limit in goals(flops, median, share):
        verdict = 'holds' if figure <= limit else f'missed by {abs(figure / limit - 1):.1%}'
        print(f'{what}: {abs(figure):.3f}, goal {abs(limit):.3f}: {verdict}')


def main(argv):
    """Check that both libraries agree, then times every variant and the matmuls in turn."""
    del argv
    torch.set_num_threads(THREADS)
    model = setup()
    makers = {'jax': jax_variant, 'torch': torch_variant}
    runs = {(lib, g): make(g, *model) for lib, make in makers.items() for g in GRADIENTS}
    for gradient in GRADIENTS:
        for step in range(2):
            ours, theirs = runs['jax', gradient](), runs['torch', gradient]()
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, err_msg=f'{gradient}, step {step}: jax, torch')
            print(f'{gradient}, step {step}: (loss, gradient norm) jax {ours}, torch {theirs}')

    cfg = model[0]
    shapes = [(BATCH.value * TOKENS.value, cfg.width, cfg.mlp_width), (2048, 2048, 2048)]
    matmuls = {(library, shape): run for shape in shapes for library, run in matmul_runs(shape).items()}
    times, rates = {variant: [] for variant in runs}, {matmul: [] for matmul in matmuls}
    for _ in range(ROUNDS.value):
        for variant, run in runs.items():
            run()  # the step after another library's pays for the memory that one gave back
            times[variant].append(seconds(run))
        for matmul, (run, flops) in matmuls.items():
            run()
            rates[matmul].append(flops / seconds(run))
    malloc = os.environ.get('GLIBC_TUNABLES', 'no GLIBC_TUNABLES')
    print(f'{BATCH.value}x{TOKENS.value} tokens, {THREADS} cores, {malloc}')
    report(cfg, times, rates)


if __name__ == '__main__':
    app.run(main)
