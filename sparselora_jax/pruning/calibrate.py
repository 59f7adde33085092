"""Sum statistics of every kernel's input over calibration batches, without hooks in the model.

The forward is traced to a program, and `tracing` finds the products in it that read a kernel. When the program runs,
each product adds the statistic of its input to an accumulator. The accumulator is a `jax.new_ref`, which `+=` updates
correctly under jit and scan.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from sparselora_jax.pruning.calibration_inputs import (
    CalibrationError,
    CheckedBatches,
    TokenWeights,
    WeightedBatch,
    check_batches,
    check_forward,
    check_params,
    check_weights,
    naming_lines,
)
from sparselora_jax.pruning.tracing import program as tracing
from sparselora_jax.pruning.tracing.products import Product
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import calling
from sparselora_jax.sparse import rules, sharding
from sparselora_jax.sparse.axes import KernelAxes

# `[tokens, inputs]` -> arrays that are sums over tokens. The statistics of two batches are added.
Statistic = Callable[[Array], Any]

# The callables that `make_observer` takes: the forward, the weights of the tokens that a kernel reads, and the
# statistic of each path.
Forward = Callable[[PyTree, Any], Any]
WeightsOf = Callable[[str, Any], Array | None]
StatisticOf = Callable[[str], Statistic | None]

# Squares of activations below 1e-19 are not normal float32 numbers. A statistic may consist of several arrays. If one
# of them is below TINY for all inputs, the statistic is collected again from activations times SCALE. SCALE is a power
# of two, so the products are exact.
TINY = 2.0**-64
SCALE = 2.0**64
# A kernel is scaled only if none of these arrays is above SAFE: the scaled squares are up to 2**128 times as large and
# must fit into float32. This matters for `Mean` of first and second moments, one of which may be 0 by chance.
SAFE = 2.0**-16

# A Hessian of this many inputs or more is computed in blocks. Smaller products run at a lower rate, on a CPU at least.
HALVED = 256

DEAD = 'all {inputs} inputs are zero on every calibration token; nothing says which of its weights matter'
SOME_DEAD = (
    '{dead} of {inputs} inputs are zero on every calibration token, or too small for float32 squares; nothing says '
    'which of their weights matter'
)
UNREPEATABLE = (
    'activations are zero, or too small for float32 squares; give the calibration batches as a list, so that they can '
    'be read a second time'
)


def squares(x: Float[Array, 'tokens inputs']) -> Float[Array, ' inputs']:
    """Return Wanda's statistic: the sum of squares of each input over all tokens, in fp32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=0)


def hessian(x: Float[Array, 'tokens inputs']) -> Float[Array, 'inputs inputs']:
    """Return SparseGPT's statistic: `x^T x`, in fp32; exactly symmetric from `HALVED` inputs on.

    Of a symmetric matrix only the blocks on and below the diagonal are computed, and the others copied. From
    2 * `HALVED` inputs on, this saves 37.5 % to 50 % of the operations.
    """
    return _gram(x.astype(jnp.float32))


def _gram(x: Float[Array, 'tokens inputs']) -> Float[Array, 'inputs inputs']:
    """Return `x^T x` of float32 numbers."""
    inputs = x.shape[1]
    if inputs < HALVED:
        return jnp.matmul(x.T, x, precision='highest')
    # Halving again and again keeps products large: of all blocks below the diagonal, most are in the first product.
    first = x[:, : inputs // 2]
    second = x[:, inputs // 2 :]
    below = jnp.matmul(second.T, first, precision='highest')
    upper_rows = jnp.concatenate([_gram(first), below.T], axis=1)
    lower_rows = jnp.concatenate([below, _gram(second)], axis=1)
    return jnp.concatenate([upper_rows, lower_rows])


@dataclass(frozen=True)
class Mean:
    """A statistic that is averaged over all tokens instead of summed; equal to a `Mean` with an equal `stat`."""

    stat: Statistic

    def __call__(self, x: Float[Array, 'tokens inputs']) -> PyTree:
        """Return the sum over the tokens of one call; `_finish` divides it by their number."""
        return self.stat(x)

    def weighted(self, x: Float[Array, 'tokens inputs'], weights: Float[Array, ' tokens']) -> PyTree:
        """Return the weighted sum over the tokens of one call; `_finish` divides it by the sum of their weights."""
        return statistic_of(self.stat, x, weights)


@dataclass(frozen=True)
class _Scaled:
    """A statistic of `SCALE * x`: for activations whose squares are too small for float32."""

    stat: Statistic

    def __call__(self, x: Float[Array, 'tokens inputs']) -> PyTree:
        return self.stat(x.astype(jnp.float32) * jnp.float32(SCALE))

    def weighted(self, x: Float[Array, 'tokens inputs'], weights: Float[Array, ' tokens']) -> PyTree:
        return statistic_of(self.stat, x.astype(jnp.float32) * jnp.float32(SCALE), weights)


def statistic_of(
    stat: Statistic, x: Float[Array, 'tokens inputs'], weights: Float[Array, ' tokens'] | None = None
) -> PyTree:
    """Return the statistic of tokens, each of which counts as often as its weight says.

    Args:
      stat: the statistic.
      x: the tokens.
      weights: their weights; None: each token counts once.

    Raises:
      CalibrationError: there are weights, and the statistic cannot take them.
    """
    if weights is None:
        return stat(x)
    if stat in (squares, hessian):
        # Both are quadratic in a token. A root of 1 is 1, so such a token keeps its bits.
        return stat(x.astype(jnp.float32) * jnp.sqrt(weights)[:, None])
    if not hasattr(stat, 'weighted'):
        raise CalibrationError(
            f'statistic {name_of(stat)} cannot weigh tokens by numbers: give weights of True and False, or give it a '
            'method weighted(x, weights)'
        )
    return stat.weighted(x, weights)


def statistic_shapes(stat: Statistic, inputs: int) -> PyTree:
    """Return the shapes and dtypes of a statistic, each a `jax.ShapeDtypeStruct`.

    Args:
      stat: the statistic.
      inputs: length of the kernel's input axis.

    Raises:
      CalibrationError: the statistic fails.
    """
    return _shapes_of(stat, jax.ShapeDtypeStruct((1, inputs), jnp.float32))


def _shapes_of(stat: Statistic, rows: jax.ShapeDtypeStruct, weights: jax.ShapeDtypeStruct | None = None) -> PyTree:
    """Return the shapes of the statistic of some rows."""
    with calling(f'statistic {name_of(stat)}', CalibrationError):
        return jax.eval_shape(functools.partial(statistic_of, stat), rows, weights)


def can_be_scaled(stat: Statistic | None) -> bool:
    """Return whether only the ratios of a statistic's numbers matter, so that activations may be scaled.

    This holds for sums of squares and Hessians, and for statistics that say `only_ratios_matter`. Others, such as
    counts of outliers, mean something else when activations are scaled.

    Args:
      stat: the statistic; None counts as one that may be scaled.
    """
    if isinstance(stat, Mean):
        return can_be_scaled(stat.stat)
    return stat is None or stat in (squares, hessian) or getattr(stat, 'only_ratios_matter', False)


def name_of(stat: Statistic) -> str:
    """Return the name of a statistic for messages; a function's is its own name."""
    if isinstance(stat, Mean):
        return f'mean of {name_of(stat.stat)}'
    return getattr(stat, '__name__', repr(stat))


class InputStatistic(NamedTuple):
    """What calibration says about the input of one kernel.

    Attributes:
      total: the statistic over all tokens, with the kernel's layer axes in front.
      tokens: number of tokens that count (those of a weight above 0), of each layer.
      axes: the roles of the kernel's axes; None: they are `[*layers, inputs, outputs]`.
    """

    total: PyTree
    tokens: Int[Array, '*layers']
    axes: KernelAxes | None = None


class KernelSums(NamedTuple):
    """The sums of one kernel, with one axis of layers in front.

    Attributes:
      total: the statistic.
      tokens: number of tokens of a weight above 0.
      extra_weight: sum of the weights of tokens, less their number; None: weights are no numbers.
    """

    total: PyTree
    tokens: Int[Array, '...']
    extra_weight: Float[Array, '...'] | None


class Recorder:
    """Accumulators of one kernel (all its layers) while a program runs; compared by identity."""

    def __init__(self, stat: Statistic, layers: int, inputs: int, weights: Shaped[Array, '*tokens'] | None):
        """Create accumulators of zeros.

        Args:
          stat: the statistic to accumulate.
          layers: number of layers of the kernel; 1 if it has no axis of layers.
          inputs: number of inputs.
          weights: weight of each token, True and False or numbers; None: all count once.
        """
        self.stat = stat
        self.weights = weights
        # What the tokens are whose axes are not those of the weights.
        self.other_rows: str | None = None
        # Stored so that `_leaders` can tell which kernels read the same array.
        self.products: list[Product] = []
        # Masks need no such sum; on a mesh each sum is sent.
        self.has_numbers = weights is not None and weights.dtype != jnp.bool_
        zeros = KernelSums(
            jax.tree.map(lambda leaf: jnp.zeros((layers, *leaf.shape), jnp.float32), statistic_shapes(stat, inputs)),
            tokens=jnp.zeros(layers, jnp.int32),
            extra_weight=jnp.zeros(layers, jnp.float32) if self.has_numbers else None,
        )
        self.sums = jax.tree.map(jax.new_ref, zeros)

    def add(self, product: Product, sums: PyTree) -> None:
        """Add the statistic of one product's input, without padding.

        Args:
          product: the product.
          sums: `self.sums`, as they are seen at the place of the product.
        """
        # Slices of one kernel (the q, k and v of a joined one) read the same rows, which count once.
        is_counted = any(product.share_key() == other.share_key() for other in self.products)
        self.products.append(product)
        if is_counted:
            return
        new_sums, layers = product.placement.combine(self._sums_of(product), product.layer_indices())
        if len(layers) == 1:
            # A plain index is updated in place; under scan the update lands in the layer's own row.
            layers = layers[0]
            new_sums = jax.tree.map(lambda leaf: leaf[0], new_sums)
        for old, new in zip(jax.tree.leaves(sums), jax.tree.leaves(new_sums), strict=True):
            # Devices may have read the same layer, which `old[layers] += new` would change once.
            jax.ref.addupdate(old, layers, new)

    def _sums_of(self, product: Product) -> KernelSums:
        """Return the sums over the rows of each layer that a product reads."""
        rows = product.arrangement.rows(product.x)
        weights = self._weights_of_rows(product)
        if product.group_sizes is None and len(rows) == 1:
            # Without a loop, whose program would differ from that of a plain kernel.
            return jax.tree.map(lambda leaf: leaf[None], self._sum(rows[0], weights))
        if product.group_sizes is None:
            return jax.lax.map(lambda of_layer: self._sum(of_layer, weights), rows)
        # Rows are sorted by expert: each expert sees zeros in place of the rows of the others.
        ends = jnp.cumsum(product.group_sizes)
        positions = jnp.arange(rows.shape[1])

        def of_expert(bounds):
            start, end = bounds
            return self._sum(rows[0], (positions >= start) & (positions < end))

        return jax.lax.map(of_expert, (ends - product.group_sizes, ends))

    def _weights_of_rows(self, product: Product) -> Shaped[Array, ' tokens'] | None:
        """Return the weights of the rows that a product reads; None: all count once."""
        if self.weights is None:
            return None
        weights = product.weights_of_rows(self.weights)
        if weights is None:
            is_sorted = product.group_sizes is not None
            self.other_rows = f'{list(product.arrangement.tokens)}{" sorted by expert" if is_sorted else ""}'
        return weights

    def _sum(self, rows: Float[Array, 'tokens inputs'], weights: Shaped[Array, ' tokens'] | None) -> KernelSums:
        """Return the sums over some rows."""
        tokens = jnp.asarray(rows.shape[0], jnp.int32)
        extra_weight = jnp.zeros((), jnp.float32) if self.has_numbers else None
        if weights is not None:
            # A mask needs no products, and every statistic can take one.
            is_mask = weights.dtype == jnp.bool_
            counts = weights if is_mask else weights > 0
            # Rows of zeros add nothing to any sum; leaving rows out would make shapes depend on data.
            rows = jnp.where(counts.reshape(-1, 1), rows, jnp.zeros((), rows.dtype))
            tokens = jnp.sum(counts, dtype=jnp.int32)
            weights = None if is_mask else weights.astype(jnp.float32)
            if not is_mask:
                extra_weight = jnp.sum(weights - counts.astype(jnp.float32))
        # The accumulator has the shape of one token's statistic. Anything but a sum would not fit, or be broadcast.
        for_one = statistic_shapes(self.stat, rows.shape[1])
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), (rows, weights))
        for_all = _shapes_of(self.stat, *shapes)
        if jax.tree.map(jnp.shape, for_one) != jax.tree.map(jnp.shape, for_all):
            raise CalibrationError(
                f'statistic {name_of(self.stat)} of {len(rows)} tokens has other shapes than of one token: expected a '
                'sum over the tokens'
            )
        return KernelSums(statistic_of(self.stat, rows, weights), tokens, extra_weight)


class Sums(NamedTuple):
    """Programs that sum the statistics of a forward over batches; kernels that read the same array share a sum.

    Attributes:
      zeros: `zeros(params, batch)` returns the initial sums.
      add: `add(sums, params, batch)` adds a batch to the sums; it is jitted, and the sums are donated.
      leaders: {path: path under which its sum is stored}, filled when `zeros` or `add` is traced.
      axes: {path: the roles of the kernel's axes}, filled like `leaders`, in the order in which the program reads them.
      other_rows: {path: what it reads} of the kernels that read no tokens that have weights, filled like `leaders`.
      unfollowed: {path: why} of arrays that the forward multiplies in ways that cannot be followed, filled likewise.
    """

    zeros: Callable[[PyTree, Any], dict]
    add: Callable[[dict, PyTree, Any], dict]
    leaders: dict[str, str]
    axes: dict[str, KernelAxes]
    other_rows: dict[str, str]
    unfollowed: dict[str, str]

    def total(self, params: PyTree, batches: Iterable[Any]) -> dict[str, KernelSums]:
        """Return {leader: its sums} over all batches.

        Raises:
          CalibrationError: no batch, or one that the forward does not take.
        """
        sums = None
        for number, batch in enumerate(batches):
            # The shapes of the sums come from tracing, which needs a batch.
            if sums is None:
                first_shapes = jax.tree.map(np.shape, batch)
                sums = self.zeros(params, batch)
            try:
                sums = self.add(sums, params, batch)
            except CalibrationError as error:
                # What failed for no batch before may have to do with what is new in this one.
                shapes = jax.tree.map(np.shape, batch)
                raise CalibrationError(
                    f'{error} (batch {number} of shapes {shapes}, batch 0 of {first_shapes})'
                ) from error
        if sums is None:
            raise CalibrationError('the calibration set is empty: no batch arrived')
        return sums


def _no_weights(path: str, batch: Any) -> None:
    """Return None: every row of a kernel's input counts once."""


def make_sums(
    forward: Forward,
    *,
    stats: StatisticOf,
    token_weights: WeightsOf = _no_weights,
    mesh: Mesh | AbstractMesh | None = None,
    is_required: Callable[[str], bool] = rules.named_kernel,
    may_fit_none: bool = False,
) -> Sums:
    """Return the programs that `make_observer` runs.

    Args:
      forward: see `make_observer`.
      stats: see `make_observer`.
      token_weights: see `make_observer`.
      mesh: see `make_observer`; an abstract mesh is enough for tracing.
      is_required: see `make_observer`.
      may_fit_none: see `make_observer`.
    """
    leaders: dict[str, str] = {}
    axes: dict[str, KernelAxes] = {}
    other_rows: dict[str, str] = {}
    unfollowed: dict[str, str] = {}

    def observe(params, batch):
        followed = kernel_paths(params)
        program = tracing.trace(forward, params, batch, lambda path: path in followed and stats(path) is not None)
        check_found(program, is_required)
        recorders = {}
        for path, leaf in rules.leaves_by_path(params).items():
            if path in program.axes:
                layer_sizes, inputs, _ = program.axes[path].sizes(leaf.shape)
                recorders[path] = Recorder(stats(path), math.prod(layer_sizes), inputs, token_weights(path, batch))
        sums = {path: recorder.sums for path, recorder in recorders.items()}
        program.run(params, batch, lambda product, sums: recorders[product.path].add(product, sums[product.path]), sums)
        # A side effect of tracing: which kernels share an input is known only now.
        new_leaders = _leaders(recorders)
        # The program is traced once for each shape of a batch, and all of them add to the same sums.
        if leaders:
            _check_same(leaders, new_leaders)
            _check_same(axes, program.axes)
        leaders.update(new_leaders)
        axes.update(program.axes)
        other_rows.update(_other_rows(recorders, may_fit_none))
        unfollowed.update(program.unfollowed)
        own = {path: of_kernel for path, of_kernel in sums.items() if leaders[path] == path}
        # Each device runs this on its own rows; the new leading axis has one entry for each device.
        return jax.tree.map(lambda ref: ref[...][None], own)

    @functools.cache  # one pair of programs for params of one structure
    def programs(rest):
        on_rows = jax.jit(sharding.on_own_rows(lambda arrays, batch: observe(rest.joined(arrays), batch), mesh))

        @functools.partial(jax.jit, donate_argnums=0)  # a Hessian is added to in place
        def add_statistics(sums, arrays, batch):
            of_batch = on_rows(arrays, batch)
            totals = {}
            for path, total in sums.items():
                parts = _with_extra_weight(of_batch[path], total)
                total = _with_extra_weight(total, parts)
                totals[path] = jax.tree.map(lambda total, parts: _add_in_order(total, parts, mesh), total, parts)
            return totals

        return on_rows, add_statistics

    def zeros(params, batch):
        arrays, rest = _split_off_arrays(params)
        # The shapes come from tracing the same function that `add` calls; nothing is compiled.
        shapes = programs(rest)[0].eval_shape(arrays, batch)
        return jax.tree.map(lambda s: jnp.zeros(s.shape[1:], s.dtype, device=place_of_sum(s.shape[1:], mesh)), shapes)

    def add(sums, params, batch):
        arrays, rest = _split_off_arrays(params)
        return programs(rest)[1](sums, arrays, batch)

    return Sums(zeros, add, leaders, axes, other_rows, unfollowed)


def _with_extra_weight(sums: KernelSums, others: KernelSums) -> KernelSums:
    """Return sums that can be added to others: weights may be a mask in one batch, and numbers in the next."""
    if sums.extra_weight is not None or others.extra_weight is None:
        return sums
    return sums._replace(extra_weight=jnp.zeros(sums.tokens.shape, jnp.float32))


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a batch uses kernels as the batches before it did: else their statistics could not be added.

    Raises:
      CalibrationError: it does not; names a kernel.
    """
    for path in sorted(before.keys() | now.keys()):
        if before.get(path) != now.get(path):
            raise CalibrationError(f'{path}: the forward reads it in another way than for the batches before')


def _other_rows(recorders: Mapping[str, Recorder], may_fit_none: bool) -> dict[str, str]:
    """Return {path: what it reads} of the kernels that read no tokens that have weights.

    Raises:
      CalibrationError: these are all kernels, so the weights are wrong.
    """
    weighted = {path: recorder for path, recorder in recorders.items() if recorder.weights is not None}
    other = {path: recorder.other_rows for path, recorder in weighted.items() if recorder.other_rows}
    if other and len(other) == len(weighted) and not may_fit_none:
        shape = list(next(iter(weighted.values())).weights.shape)
        rows = _listed(f'{path} {rows}' for path, rows in other.items())
        raise CalibrationError(f'weights of tokens {shape} fit the rows of no kernel: {rows}')
    return other


def _listed(texts: Iterable[str]) -> str:
    texts = list(texts)
    more = len(texts) - rules.SHOWN
    return '; '.join(texts[: rules.SHOWN]) + (f' and {more} more' if more > 0 else '')


class _Rest(NamedTuple):
    """What is left of params without their arrays: structure, and leaves such as the functions of an Equinox module."""

    structure: jax.tree_util.PyTreeDef
    leaves: tuple[Any, ...]

    def joined(self, arrays: Sequence[Array]) -> PyTree:
        """Return the params with these arrays."""
        remaining = iter(arrays)
        return self.structure.unflatten([next(remaining) if leaf is _ARRAY else leaf for leaf in self.leaves])


_ARRAY = object()  # stands where an array was taken out


def _split_off_arrays(params: PyTree) -> tuple[list[Array | np.ndarray], _Rest]:
    leaves, structure = jax.tree.flatten(params)
    arrays = [leaf for leaf in leaves if tracing.is_array(leaf)]
    return arrays, _Rest(structure, tuple(_ARRAY if tracing.is_array(leaf) else leaf for leaf in leaves))


def _place_in_params(path: str, layer: int | None) -> str:
    """Return the name of a kernel in warnings."""
    return path if layer is None else f'{path}, layer {layer}'


def make_observer(
    forward: Forward,
    *,
    stats: StatisticOf,
    token_weights: WeightsOf = _no_weights,
    mesh: Mesh | None = None,
    one_scale: bool = False,
    is_required: Callable[[str], bool] = rules.named_kernel,
    name_of_batch: str = 'batch',
    may_fit_none: bool = False,
) -> Callable[..., dict[str, InputStatistic]]:
    """Return `(params, batches) -> {path: InputStatistic}`, compiled once for batches of one shape.

    Kernels that read the same array (q, k and v) share one accumulator and one result.

    Squares of very small activations underflow in float32. If a statistic of a kernel and layer is below 2**-64 for all
    inputs, its statistics are computed again from activations times 2**64, if `can_be_scaled`. The masks and updates of
    Wanda, RIA and SparseGPT depend only on ratios of statistics, so they are the same as with exact statistics. DSnoT
    compares errors with an absolute threshold besides. Other kernels are never scaled. A warning names each kernel
    whose inputs are zero on every token.

    Args:
      forward: `forward(weights, batch)`; its kernels are used through `sl.linear`. Its result is discarded.
      stats: path -> the statistic of that kernel, or None for a kernel that is not observed.
      token_weights: (path, batch) -> the weights of the tokens that the kernel reads, True and False or numbers of 0 or
        more; None: all count once. They are applied where the axes of the weights are the first axes of the tokens
        (`Arrangement.weights_of_rows`). A warning names, once, the kernels where they are not: all their rows count.
      mesh: mesh over which the rows of all batches are split (`sharding.mesh_of_rows`). Each device runs `forward` on
        its own rows with whole weights. The sums are added in the order of the devices. So the result equals, bit for
        bit, that of one device that reads the same rows as consecutive batches.
      one_scale: scale either all kernels or none, for callers that compare the statistics of different kernels.
      is_required: path -> whether it is an error if no product reads that leaf. Other leaves may be no kernels.
      name_of_batch: what errors call a batch.
      may_fit_none: whether it is no error if the weights of tokens fit no kernel.

    Returns:
      A function of params, batches and optionally `place(path, layer)`, which names a kernel in warnings. The batches
      are a sequence, so that they can be read twice. The function raises `CalibrationError` if there is no batch, if
      the forward never used a kernel, if the weights fit no kernel, or if activations are not finite.
    """
    options = {
        'token_weights': token_weights,
        'mesh': mesh,
        'is_required': is_required,
        'may_fit_none': may_fit_none,
    }
    programs = make_sums(forward, stats=stats, **options)

    def scaled_stats(path):
        stat = stats(path)
        return None if stat is None else _Scaled(stat)

    # A second set of programs, so that scaling does not change the programs of ordinary models.
    @functools.cache  # compiled for the first kernel that needs it, and for none in ordinary models
    def scaled_programs():
        return make_sums(forward, stats=scaled_stats, **options)

    named: set[str] = set()  # kernels without weights, and without a statistic, that a warning has named

    def observe(params, batches, place=_place_in_params):
        sums = programs.total(params, batches)
        unnamed = {path: rows for path, rows in programs.other_rows.items() if path not in named}
        _warn_about_rows({place(path, None): rows for path, rows in unnamed.items()})
        named.update(unnamed)
        unfollowed = {path: reason for path, reason in programs.unfollowed.items() if path not in named}
        warn_about_unfollowed({place(path, None): reason for path, reason in unfollowed.items()})
        named.update(unfollowed)
        leaves = rules.leaves_by_path(params)
        sizes = {path: programs.axes[path].sizes(leaves[path].shape) for path in sums}
        stacked = {path: bool(layers) for path, (layers, _, _) in sizes.items()}
        _check_tokens(sums, stacked, programs.axes)

        def first_bad(largest):
            return _first_not_finite(largest, programs.axes, stacked)

        largest = _largest_by_path(sums)
        bad = first_bad(largest)
        if bad is not None:
            # Finding the batch takes a second run, which only bad activations pay for.
            of_batches = (first_bad(_largest_by_path(programs.total(params, [batch]))) for batch in batches)
            raise _not_finite_error(bad, of_batches, isinstance(batches, Iterator), name_of_batch)
        tiny = {path: _is_tiny(largest[path]) & can_be_scaled(stats(path)) for path in sums}
        # Kernels are compared with each other: beside ordinary statistics, tiny ones count as 0 and stay unscaled.
        if one_scale and not all(layers.all() for layers in tiny.values()):
            tiny = {path: np.zeros_like(layers) for path, layers in tiny.items()}
        if any(layers.any() for layers in tiny.values()):
            readers = {path: [other for other, first in programs.leaders.items() if first == path] for path in sums}
            if isinstance(batches, Iterator):  # a generator is used up by now
                _warn_about(tiny, stacked, readers, place, dict.fromkeys(sums, UNREPEATABLE))
            else:
                scaled = scaled_programs().total(params, batches)
                sums = {path: _choose(tiny[path], scaled[path], value) for path, value in sums.items()}
                dead = {path: tiny[path] & ~values.any(axis=0) for path, values in _largest_by_path(scaled).items()}
                messages = {path: DEAD.format(inputs=inputs) for path, (_, inputs, _) in sizes.items()}
                _warn_about(dead, stacked, readers, place, messages)
        finished = {path: _finish(sizes[path][0], stats(path), value) for path, value in sums.items()}
        return {path: InputStatistic(*finished[first], programs.axes[path]) for path, first in programs.leaders.items()}

    return observe


def place_of_sum(shape: tuple[int, ...], mesh: Mesh | AbstractMesh | None) -> NamedSharding | None:
    """Return the sharding of a sum `[layers, ...]`: vectors are replicated, a Hessian is split by columns."""
    if mesh is None:
        return None
    # [layers, inputs, inputs] is a Hessian: the one statistic too large for every device to hold.
    columns = (None, None, *sharding.BATCH) if len(shape) == 3 else ()
    return sharding.fitting(mesh, PartitionSpec(*columns), shape)


def _add_in_order(total: Array, parts: Array, mesh: Mesh | AbstractMesh | None) -> Array:
    """Return `total + parts[0] + parts[1] + ...`, in this order; each device has one of the parts.

    Each device receives its columns of all parts of a Hessian. A reduction would send as many bytes, but add them in an
    unknown order.
    """
    if mesh is None:
        return total + parts[0]
    place = PartitionSpec(None, *place_of_sum(parts.shape[1:], mesh).spec)
    parts = jax.lax.with_sharding_constraint(sharding.split_rows(parts, mesh), NamedSharding(mesh, place))
    # A scan adds in a fixed order; a compiler may reorder a sum over an axis.
    return jax.lax.scan(lambda total, part: (total + part, None), total, parts)[0]


def _leaders(recorders: dict[str, Recorder]) -> dict[str, str]:
    """Return {path: the first path that read the same array}."""
    first: dict[Any, str] = {}
    leaders = {}
    for path, recorder in recorders.items():
        # A kernel that is used more than once shares its sum with those that read the same arrays as often.
        keys = frozenset(product.share_key() for product in recorder.products)
        leaders[path] = first.setdefault((keys, recorder.stat), path)
    return leaders


def kernel_paths(params: PyTree) -> set[str]:
    """Return the paths of the leaves that may be kernels.

    In a tree whose matrices are called `kernel`, these are the kernels. In any other tree, every array of two or more
    axes may be one; whether it is, the program says.

    Args:
      params: any tree.
    """
    matrices = {path for path, leaf in rules.leaves_by_path(params).items() if _is_matrix(leaf)}
    # In such a tree, embeddings and tables of positions have other names, and nobody means to prune them.
    named = {path for path in matrices if rules.named_kernel(path)}
    return named or matrices


def _is_matrix(leaf: object) -> bool:
    # Nothing of an array without elements can be pruned, and no token can reach it.
    return getattr(leaf, 'ndim', 0) >= 2 and math.prod(leaf.shape) > 0


def check_found(program: tracing.Program, is_required: Callable[[str], bool] = rules.named_kernel) -> None:
    """Check that the program multiplies with each leaf that has to be a kernel, and with some leaf.

    Args:
      program: a traced forward.
      is_required: path -> whether that leaf has to be one.

    Raises:
      CalibrationError: it does not; names the kernel and the operation that lost it.
    """
    # A matrix under another name may be no kernel at all, but some leaf must be one.
    lost = {path: reason for path, reason in program.lost.items() if is_required(path) or not program.axes}
    for path, reason in lost.items():
        remedy = '; leave it out of select' if program.axes else ''
        raise CalibrationError(f'{path}: no product of the forward reads it: {reason}{remedy}')


def check_weights_fit(forward: Forward, params: PyTree, weighted: WeightedBatch) -> None:
    """Check that the weights of a batch fit the rows of some kernel; nothing is computed.

    Args:
      forward: `forward(params, batch)`.
      params: see `collect`.
      weighted: a batch, and the weights of its tokens.

    Raises:
      CalibrationError: they fit none, so they are wrong.
    """
    sums = make_sums(
        lambda params, weighted: forward(params, weighted.batch),
        stats=lambda path: squares,
        token_weights=lambda path, weighted: weighted.weights,
        is_required=lambda path: False,
    )
    sums.zeros(params, weighted)


def collect(
    forward: Forward,
    params: PyTree,
    batches: Iterable[Any],
    *,
    stat: Statistic = squares,
    weights: TokenWeights = None,
    select: Callable[[str], bool] | None = None,
) -> dict[str, InputStatistic]:
    """Run `forward` over the batches and sum up the statistic of every kernel's input.

    The forward may be any function that JAX can trace, whichever library wrote it. It is not run as it is: its program
    is searched for products with a leaf of params, and the other operand of such a product is the kernel's input. The
    leaf may be sliced out of a stack, transposed, reshaped, cast, masked or scaled before.

    Args:
      forward: `forward(params, batch)`. Its result is discarded.
      params: any tree of arrays: nested dicts, lists, the state of an NNX model, an Equinox module. If some matrices
        are called `kernel`, those are the kernels; else all matrices that a product reads.
      batches: what `forward` takes. Each new shape is compiled once more.
      stat: `squares` or `hessian`, or any sum over tokens `[tokens, in] -> arrays`; `Mean` of one gives the mean.
      weights: a weight for each token: the name of an entry of each batch, such as `'attention_mask'`, or a function
        batch -> array, or None (all tokens count once). Weights are True and False, or numbers of 0 or more; a token of
        weight 2 counts as two tokens do. They have the leading axes of the batch, such as `[batch, tokens]`, and are
        applied to the kernels whose rows have these axes first (`[batch, tokens, ...]`, or joined to one axis). Other
        kernels, such as those that read pooled tokens, or tokens that are sorted by expert, count every row once. One
        line of the log names them. `squares`, `hessian` and the statistics of the library's methods take numbers.
      select: path -> whether to observe that kernel; Hessians of all kernels may not fit into memory. A product must
        read each matrix that it picks. None: all kernels.

    Returns:
      {path: (total, tokens, axes)}, an `InputStatistic` each. If the squares of activations underflow in float32, the
      statistic is that of the activations times 2**64 (`make_observer`).

    Raises:
      CalibrationError: an argument is of the wrong kind; no batch; the forward fails, or reads the values of arrays; a
        kernel that it never used or that cannot be followed; a batch that it does not take; weights that are negative,
        not finite, or fit no kernel; activations that are not finite, of which batch, kernel and layer are named.

    >>> params = {'q': {'kernel': jnp.ones((2, 3))}}
    >>> stats = collect(lambda w, x: x @ w['q']['kernel'], params, [jnp.array([[1.0, 2.0], [3.0, 4.0]])])
    >>> stats['q/kernel'].total.tolist(), int(stats['q/kernel'].tokens)
    ([10.0, 20.0], 2)
    """
    check_forward(forward, 'params', 'batch')
    check_batches(batches)
    check_params(params)
    check_weights(weights)
    selected = _selected(params, select)
    checked = CheckedBatches(batches, weights)
    run = naming_lines(forward)
    # With weights, what the program gets as its batch is a `WeightedBatch`.
    observe = make_observer(
        run if weights is None else lambda params, weighted: run(params, weighted.batch),
        stats=lambda path: stat if path in selected else None,
        token_weights=_no_weights if weights is None else lambda path, weighted: weighted.weights,
        is_required=rules.named_kernel if select is None else selected.__contains__,
    )
    # Batches that can be read only once stay so.
    statistics = observe(params, iter(checked) if isinstance(batches, Iterator) else checked)
    dead = {path: processes.on_host(count_dead_inputs(stat, value.total)) for path, value in statistics.items()}
    leaves = rules.leaves_by_path(params)
    warn_about_dead_inputs(dead, {path: value.axes.sizes(leaves[path].shape)[1] for path, value in statistics.items()})
    return statistics


def _selected(params: PyTree, select: object) -> set[str]:
    """Return the paths of the matrices to observe.

    Raises:
      CalibrationError: there are none, or `select` is no function or fails.
    """
    matrices = sorted(kernel_paths(params))
    if not matrices:
        raise CalibrationError('params hold no array of two or more axes, so no kernel')
    if select is None:
        return set(matrices)
    if not callable(select):
        raise CalibrationError(f'select is a {type(select).__name__}: expected a function from a path to True or False')
    with calling('function select', CalibrationError):
        selected = {path for path in matrices if select(path)}
    if not selected:
        raise CalibrationError(f'select picks none of {len(matrices)} matrices, such as {matrices[0]}')
    return selected


def _check_tokens(sums: Mapping[str, KernelSums], stacked: Mapping[str, bool], axes: Mapping[str, KernelAxes]) -> None:
    """Check that every kernel was read.

    Raises:
      CalibrationError: no token reached a kernel.
    """
    for path, sums_of_kernel in sums.items():
        is_unread = processes.on_host(sums_of_kernel.tokens) == 0
        if is_unread.any():
            place = _place_in_params(path, int(is_unread.argmax()) if stacked[path] else None)
            roles = axes[path]
            reason = ''
            # A matrix is more often read by columns than a stack of vectors is.
            if roles.layers and not roles.outputs:
                reason = f'; products read single indices of axis {roles.layers[-1]}, each of which is a layer then'
            raise CalibrationError(
                f'{place}: no token reached it during calibration (one of weight 0 does not count){reason}'
            )


def _first_not_finite(
    largest: Mapping[str, Float[np.ndarray, 'leaves layers']], order: Iterable[str], stacked: Mapping[str, bool]
) -> str | None:
    """Return the name of the first kernel and layer whose sums are not finite; None: all are.

    Args:
      largest: the largest number of each leaf and layer, by path.
      order: paths, in the order in which the program reads the kernels.
      stacked: whether a kernel has layers, by path.
    """
    # Kernels that share a sum with an earlier one have none of their own.
    for path in (path for path in order if path in largest):
        bad = ~np.isfinite(largest[path]).all(axis=0)
        if bad.any():
            return _place_in_params(path, int(bad.argmax()) if stacked[path] else None)
    return None


def _not_finite_error(
    place: str, of_batches: Iterable[str | None], is_used_up: bool, name_of_batch: str
) -> CalibrationError:
    """Return an error that says in which batch activations are not finite.

    Args:
      place: the first kernel and layer in which the sums over all batches are not finite.
      of_batches: the same of each batch, or None where its sums are finite.
      is_used_up: whether the batches cannot be read again.
      name_of_batch: see `make_observer`.
    """
    if is_used_up:
        return CalibrationError(
            f'{place}: activations are not finite during calibration; give the batches as a list, to learn which one'
        )
    for number, of_batch in enumerate(of_batches):
        if of_batch:
            return CalibrationError(
                f'{of_batch}: activations are not finite or too large to be squared in calibration {name_of_batch} '
                f'{number}'
            )
    return CalibrationError(
        f'{place}: activations are finite in each {name_of_batch}, but their sum is too large for float32'
    )


def _is_tiny(largest: Float[np.ndarray, 'leaves layers']) -> Bool[np.ndarray, ' layers']:
    """Return for which layers the sums of a kernel are too small for float32."""
    return (largest.min(axis=0) < TINY) & (largest.max(axis=0) < SAFE)


def count_dead_inputs(stat: Statistic, total: PyTree) -> Int[Array, '*layers'] | int:
    """Return how many inputs of a kernel were zero on all calibration tokens; 0 where the statistic does not tell.

    Args:
      stat: the statistic.
      total: its sum or mean, with a layers axis in front if the kernel has one.
    """
    # Zeros of other statistics, such as counts of outliers, are not zeros of the activations.
    if not can_be_scaled(stat):
        return 0
    leaves = jax.tree.leaves(total)
    axes = [len(leaf.shape) for leaf in jax.tree.leaves(statistic_shapes(stat, 1))]
    return _count_dead(leaves, tuple(axes))


@functools.partial(jax.jit, static_argnames='axes')
def _count_dead(leaves: list[Array], axes: tuple[int, ...]) -> Int[Array, '*layers']:
    # A vector [inputs] is zero at a dead input; so is the diagonal of a matrix [inputs, inputs].
    per_input = [
        leaf if num_axes == 1 else jnp.diagonal(leaf, axis1=-2, axis2=-1)
        for leaf, num_axes in zip(leaves, axes, strict=True)
    ]
    is_dead = functools.reduce(jnp.logical_and, [leaf == 0 for leaf in per_input])
    return jnp.sum(is_dead, axis=-1, dtype=jnp.int32)


def warn_about_dead_inputs(counts: Mapping[str, Int[np.ndarray, '*layers']], inputs: Mapping[str, int]) -> None:
    """Log one line for each kernel some of whose inputs are dead; `make_observer` names those of which all are.

    Args:
      counts: number of dead inputs, of each layer if the kernel is stacked, by path.
      inputs: number of inputs of each kernel, by path.
    """
    if not processes.first():
        return
    for path, of_layers in counts.items():
        partly = np.flatnonzero((of_layers > 0) & (of_layers < inputs[path]))
        if not partly.size:
            continue
        most = int(np.reshape(of_layers, -1)[partly].max())
        place = path if np.ndim(of_layers) == 0 else f'{path}, {partly.size} of {np.size(of_layers)} layers'
        message = SOME_DEAD.format(dead=f'up to {most}' if partly.size > 1 else most, inputs=inputs[path])
        logging.getLogger(__name__).warning('%s: %s', place, message)


@jax.jit
def _largest(total: PyTree) -> Float[Array, 'leaves layers']:
    """Return the largest absolute value of each leaf and layer; NaN where there is a NaN."""
    leaves = jax.tree.leaves(total)
    return jnp.stack([jnp.max(jnp.abs(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in leaves])


def _largest_by_path(sums: Mapping[str, KernelSums]) -> dict[str, Float[np.ndarray, 'leaves layers']]:
    # Only one number per leaf and layer is copied to the host: a maximum keeps NaN and infinity.
    return {path: processes.on_host(_largest(sums_of_kernel.total)) for path, sums_of_kernel in sums.items()}


def _choose(tiny: Bool[np.ndarray, ' layers'], scaled: KernelSums, plain: KernelSums) -> KernelSums:
    """Return the scaled sums of the layers that are tiny, and the plain sums of the others."""
    return jax.tree.map(
        lambda new, old: jnp.where(tiny.reshape(-1, *[1] * (old.ndim - 1)), new, old),
        scaled,
        plain,
    )


def _finish(layer_sizes: tuple[int, ...], stat: Statistic, sums: KernelSums) -> tuple[PyTree, Array]:
    """Return (sum or mean, tokens) of one kernel, with the layer axes that the kernel has."""
    total, tokens, extra_weight = sums
    if isinstance(stat, Mean):
        # The number of tokens is exact as an integer; only numbers as weights add to it.
        weight = tokens.astype(jnp.float32)
        if extra_weight is not None:
            weight += extra_weight
        total = jax.tree.map(lambda leaf: leaf / weight.reshape(-1, *[1] * (leaf.ndim - 1)), total)
    # Accumulators always have one axis of layers.
    return jax.tree.map(lambda leaf: leaf.reshape(*layer_sizes, *leaf.shape[1:]), (total, tokens))


def warn_about_unfollowed(reasons: Mapping[str, str]) -> None:
    """Log one line that names the arrays that a forward multiplies, and that get no statistic.

    Args:
      reasons: why each of them gets none.
    """
    if reasons and processes.first():
        names = _listed(f'{name}: {reason}' for name, reason in reasons.items())
        logging.getLogger(__name__).warning('arrays that are multiplied, but get no statistic: %s', names)


def _warn_about_rows(rows: Mapping[str, str]) -> None:
    """Log one line that names the kernels that read no tokens that have weights.

    Args:
      rows: what each of them reads.
    """
    if rows and processes.first():
        names = '; '.join(f'{name} {of_kernel}' for name, of_kernel in rows.items())
        logging.getLogger(__name__).warning(
            'weights of tokens do not fit the rows of %s: each of these rows counts once', names
        )


def _warn_about(
    layers_of: dict[str, Bool[np.ndarray, ' layers']],
    stacked: dict[str, bool],
    readers: dict[str, Sequence[str]],
    place: Callable[[str, int | None], str],
    messages: dict[str, str],
) -> None:
    """Log one line for each kernel and layer that is marked, with the kernels that read the same input."""
    # All processes hold the same statistics, so only one of them logs.
    if not processes.first():
        return
    for path, layers in layers_of.items():
        for layer in np.flatnonzero(layers):
            names = [place(reader, int(layer) if stacked[path] else None) for reader in readers[path]]
            logging.getLogger(__name__).warning('%s: %s', '; '.join(names), messages[path])
