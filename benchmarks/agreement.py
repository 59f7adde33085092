"""How far our masks agree with those of the public codes, which group and break ties in ways of their own.

    python benchmarks/agreement.py

One layer of correlated inputs in fp32. The sources' rules, written here in NumPy:
  Wanda (locuslab/wanda): per output, of a stable sort; N:M of the smallest n, ties as they come.
  Wanda on a ViT (Shwai-He/VLM-Compression): one threshold for the whole matrix, pruned where the score is below it.
  SparseGPT (IST-DASLab/sparsegpt), unstructured: one threshold for the block of columns and all outputs, pruned where
  the score is at most the one in place `int(size * sparsity)`, so one more than asked for.
`agree` is the share of weights that both keep or both prune.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax.numpy as jnp
import numpy as np

from sparselora_jax import pruning
from sparselora_jax.sparse.patterns import parse_pattern

INPUTS, OUTPUTS, TOKENS, BLOCK, DAMP = 512, 256, 4096, 128, 0.01


def layer() -> tuple[np.ndarray, np.ndarray]:
    """(kernel [in, out], inputs [tokens, in]), float64."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(INPUTS, INPUTS)) / INPUTS**0.5 + np.eye(INPUTS)
    return rng.normal(size=(INPUTS, OUTPUTS)), rng.normal(size=(TOKENS, INPUTS)) @ mixing


def wanda_output(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """The source's mask of a language model's layer; scores as [in, out]."""
    mask = np.ones(scores.T.shape, bool)
    order = np.argsort(scores.T, axis=1, kind='stable')[:, : int(len(scores) * sparsity)]
    np.put_along_axis(mask, order, False, axis=1)
    return mask.T


def wanda_matrix(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """The source's mask of a ViT's layer."""
    return scores >= np.sort(scores.reshape(-1))[int(scores.size * sparsity)]


def sparsegpt(kernel: np.ndarray, hessian: np.ndarray, sparsity: float) -> np.ndarray:
    """The source's unstructured mask: a threshold for each block of columns."""
    w = kernel.T.copy()
    inverse = np.linalg.inv(hessian + DAMP * np.mean(np.diag(hessian)) * np.eye(INPUTS))
    u, mask = np.linalg.cholesky(inverse).T, np.ones(w.shape, bool)
    for j in range(INPUTS):
        if j % BLOCK == 0:
            part = slice(j, j + BLOCK)
            scores = w[:, part] ** 2 / np.diag(u)[part] ** 2
            mask[:, part] = scores > np.sort(scores.reshape(-1))[int(scores.size * sparsity)]
        error = np.where(mask[:, j], 0, w[:, j]) / u[j, j]
        w[:, j:] -= np.outer(error, u[j, j:])
    return mask.T


def main() -> None:
    """Print the table."""
    kernel, x = layer()
    squares, hessian = np.sum(x**2, axis=0), x.T @ x
    scores = np.abs(kernel) * np.sqrt(squares)[:, None]
    fp32 = [jnp.asarray(array, jnp.float32) for array in (kernel, squares, hessian)]
    print("| method | group | sparsity | agree | our zeros | the source's zeros |")
    print('|---|---|---|---|---|---|')
    for sparsity in (0.5, 0.6, 0.7):
        pattern = parse_pattern(sparsity)
        for name, group, ours, theirs in (
            ('Wanda', 'output', pruning.Wanda()(fp32[0], fp32[1], pattern), wanda_output(scores, sparsity)),
            ('Wanda', 'matrix', pruning.Wanda('matrix')(fp32[0], fp32[1], pattern), wanda_matrix(scores, sparsity)),
            *(
                ('SparseGPT', group, pruning.SparseGPT(DAMP, BLOCK, group)(fp32[0], fp32[2], pattern), source)
                for source in [sparsegpt(kernel, hessian, sparsity)]
                for group in ('block', 'output')
            ),
        ):
            mask = np.asarray(ours[1])
            cells = (f'{share:.4%}' for share in (np.mean(mask == theirs), np.mean(~mask), np.mean(~theirs)))
            print(f'| {name} | {group} | {sparsity} | ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main()
