"""One restoration step on SmolLM2's real weights: SparseLoRA exact, straight-through, plain LoRA; and the same in torch.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/step.py

Every variant does the same work: 2:4 magnitude masks, LoRA of rank 8 on every kernel of the blocks, KD 0.1 against the
unmasked base, AdamW, 16x32 tokens, the head at the last `--answers` positions. JAX is the library's own
`make_train_step`; torch is written below, with the same formula. Before anything is timed, losses and gradient norms of
the two are compared over two steps. Then every round times a step of each variant and the matmuls of each library, in
turn; a figure is the median of the rounds. The matmul rate is the better of the two shapes printed (the model's most
frequent `x @ W`, and a large one), and a share is analytic FLOPs / seconds / the rate of the same library.

The tunable gives both libraries' large temporaries huge pages: without it a fifth of a step goes to page faults.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from absl import app, flags

import sparselora_jax as sl
from sparselora_jax import restore, rules
from sparselora_jax.models import embedded, gguf, llama

BATCH = flags.DEFINE_integer('batch', 16, 'sequences')
TOKENS = flags.DEFINE_integer('tokens', 32, 'tokens a sequence')
ANSWERS = flags.DEFINE_integer('answers', 32, 'last positions of a sequence that reach the head')
ROUNDS = flags.DEFINE_integer('rounds', 7, 'timed steps of each variant')
THREADS = len(os.sched_getaffinity(0))
RANK, SCALE, KD, TEMPERATURE, LR = 8, 2.0, 0.1, 2.0, 1e-4
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


def jax_variant(gradient: str, cfg, params, masks, lora, batch) -> Callable[[], tuple[float, float]]:
    """A function that runs the library's step once and returns (loss, gradient norm)."""
    answers = batch['targets'].shape[1]

    def forward(w, batch):
        x = llama.embed_tokens(w, batch['tokens'])
        hidden = llama.forward(w, cfg, x, jnp.ones(batch['tokens'].shape, bool))
        return llama.head(w, hidden[:, -answers:])

    tx = optax.adamw(LR, weight_decay=0.05)
    step = restore.make_train_step(forward, tx, kd=KD, temperature=TEMPERATURE, gradient=gradient)
    state = sl.init_state(jax.tree.map(jnp.copy, lora), tx)
    frozen = restore.Frozen(params, masks)

    def run():
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return float(metrics['loss']), float(metrics['grad_norm'])

    return run


class StraightThrough(torch.autograd.Function):
    """torch: forward and dx with the masked weight, gradients of A and B as if the mask were all ones."""

    @staticmethod
    def forward(ctx, x, w, m, a, b):
        """x @ ((W + s * A @ B) * M)."""
        weight = torch.addmm(w, a, b, alpha=SCALE) * m
        ctx.save_for_backward(x, weight, a, b)
        return x @ weight

    @staticmethod
    def backward(ctx, g):
        """dx, dA, dB."""
        x, weight, a, b = ctx.saved_tensors
        x2, g2 = x.flatten(0, -2), g.flatten(0, -2)
        return g @ weight.T, None, None, SCALE * (x2.T @ (g2 @ b.T)), SCALE * ((x2 @ a).T @ g2)


def torch_linear(gradient: str | None, x, kernel, mask, factors):
    """One adapted linear of the student, or of the teacher (`gradient` None)."""
    if gradient is None:
        return x @ kernel
    a, b = factors
    if gradient == 'plain':
        return x @ (kernel * mask) + SCALE * ((x @ a) @ b)
    if gradient == 'straight_through':
        return StraightThrough.apply(x, kernel, mask, a, b)
    return x @ (torch.addmm(kernel, a, b, alpha=SCALE) * mask)


def torch_forward(gradient: str | None, cfg, params, masks, lora, tokens, answers):
    """LLaMA in torch, with its own fused norms and attention: logits at the last positions."""
    x = params['embed'][tokens]
    batch, length, width = x.shape
    frequencies = cfg.rope_base ** (-torch.arange(0, cfg.head_dim, 2) / cfg.head_dim)
    angles = torch.arange(length)[:, None] * frequencies
    cos, sin = torch.cos(angles), torch.sin(angles)

    def heads(x, rotated):
        x = x.view(batch, length, -1, cfg.head_dim).transpose(1, 2)
        if not rotated:
            return x
        left, right = x.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    for i in range(cfg.depth):

        def dense(name, x, i=i):
            path = f'blocks/{name}/kernel'
            return torch_linear(gradient, x, params[path][i], masks[path][i], lora[path][i])

        h = F.rms_norm(x, (width,), params['blocks/norm1/scale'][i], cfg.norm_eps)
        q, k, v = (heads(dense(f'attn/{name}', h), name != 'v') for name in 'qkv')
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + dense('attn/o', h.transpose(1, 2).reshape(batch, length, width))
        h = F.rms_norm(x, (width,), params['blocks/norm2/scale'][i], cfg.norm_eps)
        x = x + dense('mlp/down', F.silu(dense('mlp/gate', h)) * dense('mlp/up', h))
    return F.rms_norm(x[:, -answers:], (width,), params['norm/scale'], cfg.norm_eps) @ params['embed'].T


def torch_variant(gradient: str, cfg, params, masks, lora, batch) -> Callable[[], tuple[float, float]]:
    """A function that runs the same step in torch and returns (loss, gradient norm)."""
    params, masks = (
        {path: torch.from_dlpack(leaf) for path, leaf in rules.flatten(t).items()} for t in (params, masks)
    )
    masks = {path: mask.float() for path, mask in masks.items()}
    tokens, targets = (torch.from_dlpack(batch[name]).long() for name in ('tokens', 'targets'))
    # One leaf a layer and factor, as a torch module has them.
    leaves = {
        path: [
            tuple(torch.tensor(np.asarray(f[i])).requires_grad_() for f in (leaf.a, leaf.b)) for i in range(cfg.depth)
        ]
        for path, leaf in rules.flatten(lora).items()
    }
    trained = [leaf for layers in leaves.values() for pair in layers for leaf in pair]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.05)

    def run():
        optimizer.zero_grad()
        with torch.no_grad():
            teacher = torch_forward(None, cfg, params, masks, leaves, tokens, targets.shape[1])
        student = torch_forward(gradient, cfg, params, masks, leaves, tokens, targets.shape[1])
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        log_student, log_teacher = (F.log_softmax(t / TEMPERATURE, dim=-1) for t in (student, teacher))
        kl = F.kl_div(log_student, log_teacher, reduction='batchmean', log_target=True)
        loss = (1 - KD) * F.cross_entropy(student, targets.flatten()) + KD * kl
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([leaf.grad for leaf in trained])))
        optimizer.step()
        return loss.item(), norm.item()

    return run


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def matmul_runs(shape: tuple[int, int, int]) -> dict[str, tuple[Callable[[], object], float]]:
    """For each library: a function that repeats one `x @ W`, and the FLOPs of a call (about 20 G)."""
    m, k, n = shape
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=size).astype(np.float32) for size in ((m, k), (k, n)))
    repeats = max(1, round(2e10 / (2 * m * k * n)))
    jx, jw, tx, tw, dot = jnp.asarray(x), jnp.asarray(w), torch.tensor(x), torch.tensor(w), jax.jit(jnp.matmul)
    flops = repeats * 2 * m * k * n
    return {
        'jax': (lambda: jax.block_until_ready([dot(jx, jw) for _ in range(repeats)]), flops),
        'torch': (lambda: [tx @ tw for _ in range(repeats)], flops),
    }


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
    """Prints the matmul rates, the table, and whether each goal holds."""
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
    """Checks that both libraries agree, then times every variant and the matmuls in turn."""
    del argv
    torch.set_num_threads(THREADS)
    cfg, params = gguf.load_llama(embedded.language_model_file())
    _, masks = sl.prune_tree(params, None, [('blocks/.*', '2:4')], method=sl.Magnitude())
    lora = sl.init_lora(jax.random.key(0), params, [('blocks/.*', (RANK, SCALE * RANK))])
    lora = jax.tree.map(lambda x: x + 1e-3 * jax.random.normal(jax.random.key(1), x.shape), lora)  # B not zero
    tokens = jax.random.randint(jax.random.key(2), (BATCH.value, TOKENS.value + 1), 0, cfg.vocab)
    targets = tokens[:, -ANSWERS.value :]
    batch = {'tokens': tokens[:, :-1], 'targets': targets, 'answer': jnp.ones(targets.shape, bool)}
    makers = {'jax': jax_variant, 'torch': torch_variant}
    runs = {(lib, g): make(g, cfg, params, masks, lora, batch) for lib, make in makers.items() for g in GRADIENTS}
    for gradient in GRADIENTS:
        for step in range(2):
            ours, theirs = runs['jax', gradient](), runs['torch', gradient]()
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, err_msg=f'{gradient}, step {step}: jax, torch')
            print(
                f'{gradient}, step {step}: loss {ours[0]:.4f} = {theirs[0]:.4f}, gradient {ours[1]:.4f} = {theirs[1]:.4f}'
            )

    shapes = [(BATCH.value * TOKENS.value, cfg.width, cfg.mlp_width), (2048, 2048, 2048)]
    matmuls = {(library, shape): run for shape in shapes for library, run in matmul_runs(shape).items()}
    for run, _ in matmuls.values():
        run()
    times, rates = {variant: [] for variant in runs}, {matmul: [] for matmul in matmuls}
    for _ in range(ROUNDS.value):
        for variant, run in runs.items():
            times[variant].append(seconds(run))
        for matmul, (run, flops) in matmuls.items():
            rates[matmul].append(flops / seconds(run))
    print(
        f'{BATCH.value}x{TOKENS.value} tokens, {THREADS} cores, {os.environ.get("GLIBC_TUNABLES", "no GLIBC_TUNABLES")}'
    )
    report(cfg, times, rates)


if __name__ == '__main__':
    app.run(main)
