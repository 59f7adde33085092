"""One restoration step on SmolLM2's real weights: SparseLoRA exact, straight-through, plain LoRA; and the same in torch.

    python benchmarks/step.py

Every variant runs the same work: 2:4 magnitude masks, LoRA of rank 8 on every kernel of the blocks, KD 0.1 against the
unmasked base, AdamW, 16x32 tokens, the head at the last `--answers` positions. JAX is the library's own
`make_train_step`; torch is written below, with the same formula. Before anything is timed, losses and gradient norms of
both are compared over two steps. Variants are timed round-robin in one process; a time is the median of the rounds.

The matmul rate is the best of `x @ W` over the shapes printed, measured in the same run, one for each library; a share
is analytic FLOPs / seconds / that rate. Exit code 1 when a goal is missed.
"""

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
    params, masks = ({path: torch.from_dlpack(leaf) for path, leaf in rules.flatten(t).items()} for t in (params, masks))
    masks = {path: mask.float() for path, mask in masks.items()}
    tokens, targets = (torch.from_dlpack(batch[name]).long() for name in ('tokens', 'targets'))
    # One leaf a layer and factor, as a torch module has them.
    leaves = {
        path: [tuple(torch.tensor(np.asarray(f[i])).requires_grad_() for f in (leaf.a, leaf.b)) for i in range(cfg.depth)]
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


def matmul_rates(shapes: list[tuple[int, int, int]], rounds: int = 5) -> dict[str, dict[tuple, float]]:
    """FLOP/s of `x @ W` in each library: for each shape the median of some repetitions of about 40 GFLOP."""
    rates = {'jax': {}, 'torch': {}}
    for m, k, n in shapes:
        rng = np.random.default_rng(0)
        x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((m, k), (k, n)))
        calls = max(1, int(4e10 / (2 * m * k * n)))
        jx, jw, tx, tw, dot = jnp.asarray(x), jnp.asarray(w), torch.tensor(x), torch.tensor(w), jax.jit(jnp.matmul)
        runs = {
            'jax': lambda n=calls, x=jx, w=jw, dot=dot: jax.block_until_ready([dot(x, w) for _ in range(n)]),
            'torch': lambda n=calls, x=tx, w=tw: [x @ w for _ in range(n)],
        }
        for library, run in runs.items():
            run()
            rates[library][m, k, n] = calls * 2 * m * k * n / np.median([seconds(run) for _ in range(rounds)])
    return rates


def main(argv):
    """Checks that both libraries agree, times every variant in turn, prints the table and the goals."""
    del argv
    cfg, params = gguf.load_llama(embedded.language_model_file())
    threads = len(jax.devices()) and torch.get_num_threads()
    _, masks = sl.prune_tree(params, None, [('blocks/.*', '2:4')], method=sl.Magnitude())
    lora = sl.init_lora(jax.random.key(0), params, [('blocks/.*', (RANK, SCALE * RANK))])
    lora = jax.tree.map(lambda x: x + 1e-3 * jax.random.normal(jax.random.key(1), x.shape), lora)  # B not zero
    tokens = jax.random.randint(jax.random.key(2), (BATCH.value, TOKENS.value + 1), 0, cfg.vocab)
    targets = tokens[:, -ANSWERS.value :]
    batch = {'tokens': tokens[:, :-1], 'targets': targets, 'answer': jnp.ones(targets.shape, bool)}
    makers = {'jax': jax_variant, 'torch': torch_variant}
    runs = {(lib, g): make(g, cfg, params, masks, lora, batch) for g in GRADIENTS for lib, make in makers.items()}
    for gradient in GRADIENTS:
        for _ in range(2):
            ours, theirs = runs['jax', gradient](), runs['torch', gradient]()
            print(f'{gradient}: (loss, gradient norm) jax {ours}, torch {theirs}')
            np.testing.assert_allclose(ours, theirs, rtol=1e-3)

    rows = BATCH.value * TOKENS.value
    rates = matmul_rates([(rows, cfg.width, cfg.mlp_width), (rows, cfg.mlp_width, cfg.width), (2048, 2048, 2048)])
    times = {variant: [] for variant in runs}
    for _ in range(ROUNDS.value):
        for variant, run in runs.items():
            times[variant].append(seconds(run))
    print_table(cfg, rates, times, threads)


def print_table(cfg, rates, times, threads):
    print(threads, rates)
    flops = {g: sum(count(cfg, BATCH.value, TOKENS.value, ANSWERS.value, g)) for g in GRADIENTS}
    best = {lib: max(r.values()) for lib, r in rates.items()}
    med = {v: float(np.median(t)) for v, t in times.items()}
    for (lib, g), t in times.items():
        m = med[lib, g]
        print(
            f'{lib:6s}{g:18s}{m:8.3f} s [{min(t):.3f}, {max(t):.3f}] ratio {m / med[lib, "plain"]:.3f} flop ratio {flops[g] / flops["plain"]:.3f} torch/this {med["torch", g] / m:.2f} GF/s {flops[g] / m / 1e9:.0f} share {flops[g] / m / best[lib]:.3f}'
        )


if __name__ == '__main__':
    app.run(main)
