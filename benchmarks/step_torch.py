"""The restoration step of `step.py` in torch: the same formula, weights, masks, losses and optimiser."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from sparselora_jax.sparse import rules

SCALE, KD, TEMPERATURE, LR, WEIGHT_DECAY = 2.0, 0.1, 2.0, 1e-4, 0.05


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

    def tensors(tree):
        return {path: torch.from_dlpack(leaf) for path, leaf in rules.flatten(tree).items()}

    def layer(factors, i):  # one leaf a layer and factor, as a torch module has them
        return tuple(torch.tensor(np.asarray(factor[i])).requires_grad_() for factor in (factors.a, factors.b))

    params, masks = tensors(params), {path: mask.float() for path, mask in tensors(masks).items()}
    tokens, targets = (torch.from_dlpack(batch[name]).long() for name in ('tokens', 'targets'))
    leaves = {path: [layer(factors, i) for i in range(cfg.depth)] for path, factors in rules.flatten(lora).items()}
    trained = [leaf for layers in leaves.values() for pair in layers for leaf in pair]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=WEIGHT_DECAY)

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
