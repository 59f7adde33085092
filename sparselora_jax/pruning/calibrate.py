"""Sum statistics of every kernel's input over calibration batches, without hooks in the model.

The forward is traced to a program, and `tracing` finds the products in it that read a kernel. When the program runs,
each product adds the statistic of its input to an accumulator. The accumulator is a `jax.new_ref`, which `+=` updates
correctly under jit and scan.
"""

import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from sparselora_jax.pruning.tracing import program as tracing
from sparselora_jax.pruning.tracing.products import Product
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import SparseloraError, calling
from sparselora_jax.sparse import rules, sharding
from sparselora_jax.sparse.axes import KernelAxes

# `[tokens, inputs]` -> arrays that are sums over tokens. The statistics of two batches are added.
Statistic = Callable[[Array], Any]

# The callables that `make_observer` takes: the forward, the rows of a kernel's input that count, and the statistic of
# each path.
Forward = Callable[[PyTree, Any], Any]
ValidRows = Callable[[str, Any], Array | None]
StatisticOf = Callable[[str], Statistic | None]

# Squares of activations below 1e-19 are not normal float32 numbers. A statistic may consist of several arrays. If one
# of them is below TINY for all inputs, the statistic is collected again from activations times SCALE. SCALE is a power
# of two, so the products are exact.
TINY = 2.0**-64
SCALE = 2.0**64
# A kernel is scaled only if none of these arrays is above SAFE: the scaled squares are up to 2**128 times as large and
# must fit into float32. This matters for `Mean` of first and second moments, one of which may be 0 by chance.
SAFE = 2.0**-16

DEAD = 'all {inputs} inputs are zero on every calibration token; nothing says which of its weights matter'
SOME_DEAD = (
    '{dead} of {inputs} inputs are zero on every calibration token, or too small for float32 squares; nothing says '
    'which of their weights matter'
)
UNREPEATABLE = (
    'activations are zero, or too small for float32 squares; give the calibration batches as a list, so that they can '
    'be read a second time'
)


class CalibrationError(SparseloraError, ValueError):
    """An empty calibration set, values that are not finite, or a statistic that is missing or of the wrong kind."""


def squares(x: Float[Array, 'tokens inputs']) -> Float[Array, ' inputs']:
    """Return Wanda's statistic: the sum of squares of each input over all tokens, in fp32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=0)


def hessian(x: Float[Array, 'tokens inputs']) -> Float[Array, 'inputs inputs']:
    """Return SparseGPT's statistic: `x^T x`, in fp32."""
    x = x.astype(jnp.float32)
    return jnp.matmul(x.T, x, precision='highest')


@dataclass(frozen=True)
class Mean:
    """A statistic that is averaged over all tokens instead of summed; equal to a `Mean` with an equal `stat`."""

    stat: Statistic

    def __call__(self, x: Float[Array, 'tokens inputs']) -> PyTree:
        """Return the sum over the tokens of one call; `_finish` divides it by their number."""
        return self.stat(x)


@dataclass(frozen=True)
class _Scaled:
    """A statistic of `SCALE * x`: for activations whose squares are too small for float32."""

    stat: Statistic

    def __call__(self, x: Float[Array, 'tokens inputs']) -> PyTree:
        return self.stat(x.astype(jnp.float32) * jnp.float32(SCALE))


def statistic_shapes(stat: Statistic, inputs: int) -> PyTree:
    """Return the shapes and dtypes of a statistic, each a `jax.ShapeDtypeStruct`.

    Args:
      stat: the statistic.
      inputs: length of the kernel's input axis.

    Raises:
      CalibrationError: the statistic fails.
    """
    return _shapes_of(stat, jax.ShapeDtypeStruct((1, inputs), jnp.float32))


def _shapes_of(stat: Statistic, rows: jax.ShapeDtypeStruct) -> PyTree:
    """Return the shapes of the statistic of some rows."""
    with calling(f'statistic {name_of(stat)}', CalibrationError):
        return jax.eval_shape(stat, rows)


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
      tokens: number of tokens, of each layer.
      axes: the roles of the kernel's axes; None: they are `[*layers, inputs, outputs]`.
    """

    total: PyTree
    tokens: Int[Array, '*layers']
    axes: KernelAxes | None = None


class Recorder:
    """Accumulators of one kernel (all its layers) while a program runs; compared by identity."""

    def __init__(self, stat: Statistic, layers: int, inputs: int, valid: Bool[Array, '*tokens'] | None):
        """Create accumulators of zeros.

        Args:
          stat: the statistic to accumulate.
          layers: number of layers of the kernel; 1 if it has no axis of layers.
          inputs: number of inputs.
          valid: True for the rows of the flattened input that are not padding; None: all rows count.
        """
        self.stat = stat
        self.valid = valid
        # Stored so that `_leaders` can tell which kernels read the same array.
        self.products: list[Product] = []
        self.total = jax.tree.map(
            lambda leaf: jax.new_ref(jnp.zeros((layers, *leaf.shape), jnp.float32)), statistic_shapes(stat, inputs)
        )
        self.tokens = jax.new_ref(jnp.zeros(layers, jnp.int32))

    def add(self, product: Product) -> None:
        """Add the statistic of one product's input, without padding."""
        # Slices of one kernel (the q, k and v of a joined one) read the same rows, which count once.
        is_counted = any(product.share_key() == other.share_key() for other in self.products)
        self.products.append(product)
        if is_counted:
            return
        rows = product.arrangement.rows(product.x)
        statistics, counts = self._statistics(rows, product.group_sizes)
        layers = product.layer_indices()
        if len(layers) == 1:
            # A plain index is updated in place; under scan the update lands in the layer's own row.
            layers = layers[0]
            statistics, counts = jax.tree.map(lambda leaf: leaf[0], (statistics, counts))
        for total, new in zip(jax.tree.leaves(self.total), jax.tree.leaves(statistics), strict=True):
            total[layers] += new
        self.tokens[layers] += counts

    def _statistics(
        self, rows: Float[Array, 'at_once tokens inputs'], group_sizes: Int[Array, ' experts'] | None
    ) -> tuple[PyTree, Int[Array, ' layers']]:
        """Return the statistic and the number of rows of each layer that a product reads."""
        if group_sizes is None and len(rows) == 1:
            # Without a loop, whose program would differ from that of a plain kernel.
            return jax.tree.map(lambda leaf: leaf[None], self._statistic(rows[0]))
        if group_sizes is None:
            return jax.lax.map(self._statistic, rows)
        # Rows are sorted by expert: each expert sees zeros in place of the rows of the others.
        ends = jnp.cumsum(group_sizes)
        positions = jnp.arange(rows.shape[1])

        def of_expert(bounds):
            start, end = bounds
            return self._statistic(rows[0], (positions >= start) & (positions < end))

        return jax.lax.map(of_expert, (ends - group_sizes, ends))

    def _statistic(
        self, rows: Float[Array, 'tokens inputs'], counted: Bool[Array, ' tokens'] | None = None
    ) -> tuple[PyTree, Int[Array, '']]:
        """Return the statistic and the number of the rows that count."""
        count = jnp.asarray(rows.shape[0], jnp.int32)
        valid = self.valid if self.valid is None else self.valid.reshape(-1)
        if counted is not None:
            valid = counted if valid is None else valid & counted
        if valid is not None:
            # Rows of zeros add nothing to any sum; leaving rows out would make shapes depend on data.
            rows = jnp.where(valid.reshape(-1, 1), rows, jnp.zeros((), rows.dtype))
            count = jnp.sum(valid, dtype=jnp.int32)
        # The accumulator has the shape of one token's statistic. Anything but a sum would not fit, or be broadcast.
        for_one = statistic_shapes(self.stat, rows.shape[1])
        for_all = _shapes_of(self.stat, jax.ShapeDtypeStruct(rows.shape, rows.dtype))
        if jax.tree.map(jnp.shape, for_one) != jax.tree.map(jnp.shape, for_all):
            raise CalibrationError(
                f'statistic {name_of(self.stat)} of {len(rows)} tokens has other shapes than of one token: expected a '
                'sum over the tokens'
            )
        return self.stat(rows), count


class Sums(NamedTuple):
    """Programs that sum the statistics of a forward over batches; kernels that read the same array share a sum.

    Attributes:
      zeros: `zeros(params, batch)` returns the initial sums.
      add: `add(sums, params, batch)` adds a batch to the sums; it is jitted, and the sums are donated.
      leaders: {path: path under which its sum is stored}, filled when `zeros` or `add` is traced.
      axes: {path: the roles of the kernel's axes}, filled like `leaders`.
    """

    zeros: Callable[[PyTree, Any], dict]
    add: Callable[[dict, PyTree, Any], dict]
    leaders: dict[str, str]
    axes: dict[str, KernelAxes]

    def total(self, params: PyTree, batches: Iterable[Any]) -> dict[str, tuple[PyTree, Array]]:
        """Return {leader: (sum, tokens)} over all batches, layers first.

        Raises:
          CalibrationError: no batch.
        """
        sums = None
        for batch in batches:
            # The shapes of the sums come from tracing, which needs a batch.
            sums = self.zeros(params, batch) if sums is None else sums
            sums = self.add(sums, params, batch)
        if sums is None:
            raise CalibrationError('the calibration set is empty: no batch arrived')
        return sums


def _all_rows(path: str, batch: Any) -> None:
    """Return None: every row of a kernel's input counts."""


def make_sums(
    forward: Forward,
    *,
    stats: StatisticOf,
    valid: ValidRows = _all_rows,
    mesh: Mesh | AbstractMesh | None = None,
) -> Sums:
    """Return the programs that `make_observer` runs.

    Args:
      forward: see `make_observer`.
      stats: see `make_observer`.
      valid: see `make_observer`.
      mesh: see `make_observer`; an abstract mesh is enough for tracing.
    """
    leaders: dict[str, str] = {}
    axes: dict[str, KernelAxes] = {}

    def observe(params, batch):
        followed = kernel_paths(params)
        program = tracing.trace(forward, params, batch, lambda path: path in followed and stats(path) is not None)
        check_found(program)
        leaves = rules.leaves_by_path(params)
        recorders = {}
        for path, of_kernel in program.axes.items():
            layer_sizes, inputs, _ = of_kernel.sizes(leaves[path].shape)
            recorders[path] = Recorder(stats(path), math.prod(layer_sizes), inputs, valid(path, batch))
        program.run(params, batch, lambda product: recorders[product.path].add(product))
        # A side effect of tracing: which kernels share an input is known only now.
        leaders.update(_leaders(recorders))
        axes.update(program.axes)
        own = {path: (r.total, r.tokens) for path, r in recorders.items() if leaders[path] == path}
        # Each device runs this on its own rows; the new leading axis has one entry for each device.
        return jax.tree.map(lambda ref: ref[...][None], own)

    @functools.cache  # one pair of programs for params of one structure
    def programs(rest):
        on_rows = jax.jit(sharding.on_own_rows(lambda arrays, batch: observe(rest.joined(arrays), batch), mesh))

        @functools.partial(jax.jit, donate_argnums=0)  # a Hessian is added to in place
        def add_statistics(sums, arrays, batch):
            return jax.tree.map(lambda total, parts: _add_in_order(total, parts, mesh), sums, on_rows(arrays, batch))

        return on_rows, add_statistics

    def zeros(params, batch):
        arrays, rest = _split_off_arrays(params)
        # The shapes come from tracing the same function that `add` calls; nothing is compiled.
        shapes = programs(rest)[0].eval_shape(arrays, batch)
        return jax.tree.map(lambda s: jnp.zeros(s.shape[1:], s.dtype, device=place_of_sum(s.shape[1:], mesh)), shapes)

    def add(sums, params, batch):
        arrays, rest = _split_off_arrays(params)
        return programs(rest)[1](sums, arrays, batch)

    return Sums(zeros, add, leaders, axes)


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
    rest = _Rest(structure, tuple(_ARRAY if tracing.is_array(leaf) else leaf for leaf in leaves))
    try:
        hash(rest)
    except TypeError:
        kinds = ', '.join(sorted({type(leaf).__name__ for leaf in rest.leaves if leaf is not _ARRAY}))
        raise CalibrationError(f'params hold leaves that are neither arrays nor hashable: {kinds}') from None
    return arrays, rest


def _place_in_params(path: str, layer: int | None) -> str:
    """Return the name of a kernel in warnings."""
    return path if layer is None else f'{path}, layer {layer}'


def make_observer(
    forward: Forward,
    *,
    stats: StatisticOf,
    valid: ValidRows = _all_rows,
    mesh: Mesh | None = None,
    one_scale: bool = False,
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
      valid: (path, batch) -> True for the rows of that kernel's input that count, or None (all do).
      mesh: mesh over which the rows of all batches are split (`sharding.mesh_of_rows`). Each device runs `forward` on
        its own rows with whole weights. The sums are added in the order of the devices. So the result equals, bit for
        bit, that of one device that reads the same rows as consecutive batches.
      one_scale: scale either all kernels or none, for callers that compare the statistics of different kernels.

    Returns:
      A function of params, batches and optionally `place(path, layer)`, which names a kernel in warnings. The batches
      are a sequence, so that they can be read twice. The function raises `CalibrationError` if there is no batch, if
      the forward never used a kernel, or if activations are not finite.
    """
    programs = make_sums(forward, stats=stats, valid=valid, mesh=mesh)

    def scaled_stats(path):
        stat = stats(path)
        return None if stat is None else _Scaled(stat)

    # A second set of programs, so that scaling does not change the programs of ordinary models.
    @functools.cache  # compiled for the first kernel that needs it, and for none in ordinary models
    def scaled_programs():
        return make_sums(forward, stats=scaled_stats, valid=valid, mesh=mesh)

    def observe(params, batches, place=_place_in_params):
        sums = programs.total(params, batches)
        leaves = rules.leaves_by_path(params)
        sizes = {path: programs.axes[path].sizes(leaves[path].shape) for path in sums}
        stacked = {path: bool(layers) for path, (layers, _, _) in sizes.items()}
        tiny = {path: _check_sums(path, stacked[path], *value) for path, value in sums.items()}
        for path in tiny:
            tiny[path] &= can_be_scaled(stats(path))
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
                dead = {path: tiny[path] & ~_largest_on_host(scaled[path][0]).any(axis=0) for path in sums}
                messages = {path: DEAD.format(inputs=inputs) for path, (_, inputs, _) in sizes.items()}
                _warn_about(dead, stacked, readers, place, messages)
        finished = {path: _finish(sizes[path][0], stats(path), *value) for path, value in sums.items()}
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
    matrices = {path for path, leaf in rules.leaves_by_path(params).items() if getattr(leaf, 'ndim', 0) >= 2}
    # In such a tree, embeddings and tables of positions have other names, and nobody means to prune them.
    named = {path for path in matrices if rules.named_kernel(path)}
    return named or matrices


def check_found(program: tracing.Program) -> None:
    """Check that the program multiplies with each kernel whose name says that it is one.

    Args:
      program: a traced forward.

    Raises:
      CalibrationError: it does not; names the kernel and the operation that lost it.
    """
    # A matrix under another name may be no kernel at all, but some leaf must be one.
    lost = {path: reason for path, reason in program.lost.items() if rules.named_kernel(path) or not program.axes}
    for path, reason in lost.items():
        raise CalibrationError(f'{path}: no product of the forward reads it: {reason}')


def check_forward(forward: object, *arguments: str) -> None:
    """Check that an object is a function that runs a model.

    Args:
      forward: what a user gave as a forward.
      *arguments: names of what it is called with, in order.

    Raises:
      CalibrationError: it cannot be called so.
    """
    expected = f'expected a function of ({", ".join(arguments)}), such as model.hidden'
    if not callable(forward):
        raise CalibrationError(f'forward is a {type(forward).__name__}: {expected}')
    try:
        inspect.signature(forward).bind(*arguments)
    except TypeError as error:
        raise CalibrationError(f'forward: {error}: {expected}') from None
    except ValueError:
        # Some functions that are not written in Python have no signature; calling them will tell.
        return


def check_batches(batches: object) -> None:
    """Check that an object can hold calibration batches.

    Args:
      batches: what a user gave as batches.

    Raises:
      CalibrationError: it is one batch, or cannot be iterated.
    """
    # A dict can be iterated too, over its keys.
    if isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
        raise CalibrationError(f'batches is a {type(batches).__name__}: expected a list of batches, such as [batch]')


def collect(
    forward: Forward,
    params: PyTree,
    batches: Iterable[Any],
    *,
    stat: Statistic = squares,
    valid: Callable[[Any], Array | None] | None = None,
    select: Callable[[str], bool] = lambda path: True,
) -> dict[str, InputStatistic]:
    """Run `forward` over the batches and sum up the statistic of every kernel's input.

    The forward may be any function that JAX can trace, whichever library wrote it. It is not run as it is: its program
    is searched for products with a leaf of params, and the other operand of such a product is the kernel's input. The
    leaf may be sliced out of a stack, transposed, reshaped, cast, masked or scaled before.

    Args:
      forward: `forward(params, batch)`. Its result is discarded.
      params: any tree of arrays: nested dicts, lists, the state of an NNX model, an Equinox module. If some matrices
        are called `kernel`, those are the kernels; else all matrices that a product reads.
      batches: what `forward` takes, of one shape.
      stat: `squares` or `hessian`, or any sum over tokens `[tokens, in] -> arrays`; `Mean` of one gives the mean.
      valid: batch -> True for the tokens that count, or None (all do); every kernel must see these tokens.
      select: path -> whether to observe that kernel; Hessians of all kernels may not fit into memory.

    Returns:
      {path: (total, tokens, axes)}, an `InputStatistic` each. If the squares of activations underflow in float32, the
      statistic is that of the activations times 2**64 (`make_observer`).

    Raises:
      CalibrationError: no batch, a kernel that the forward never used or that cannot be followed, or non-finite
        activations.

    >>> params = {'q': {'kernel': jnp.ones((2, 3))}}
    >>> stats = collect(lambda w, x: x @ w['q']['kernel'], params, [jnp.array([[1.0, 2.0], [3.0, 4.0]])])
    >>> stats['q/kernel'].total.tolist(), int(stats['q/kernel'].tokens)
    ([10.0, 20.0], 2)
    """
    check_forward(forward, 'params', 'batch')
    if not callable(select):
        raise CalibrationError(f'select is a {type(select).__name__}: expected a function from a path to True or False')
    check_batches(batches)

    def valid_rows(path, batch):
        return None if valid is None else valid(batch)

    observe = make_observer(forward, stats=lambda path: stat if select(path) else None, valid=valid_rows)
    statistics = observe(params, batches)
    dead = {path: processes.on_host(count_dead_inputs(stat, value.total)) for path, value in statistics.items()}
    leaves = rules.leaves_by_path(params)
    warn_about_dead_inputs(dead, {path: value.axes.sizes(leaves[path].shape)[1] for path, value in statistics.items()})
    return statistics


def _check_sums(path: str, stacked: bool, total: PyTree, tokens: Int[Array, ' layers']) -> Bool[np.ndarray, ' layers']:
    """Check one kernel's sums, and return for which layers they are too small for float32.

    Raises:
      CalibrationError: no token reached the kernel, or its inputs were not finite.
    """
    is_unread = processes.on_host(tokens) == 0
    if is_unread.any():
        place = _place_in_params(path, int(is_unread.argmax()) if stacked else None)
        raise CalibrationError(f'{place}: no token reached it during calibration')
    # Only one number per leaf and layer is copied to the host: a maximum keeps NaN and infinity.
    largest = _largest_on_host(total)
    bad = ~np.isfinite(largest).all(axis=0)
    if bad.any():
        layer = f', layer {int(bad.argmax())}' if stacked else ''
        raise CalibrationError(f'{path}{layer}: activations are not finite during calibration')
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


def _largest_on_host(total: PyTree) -> Float[np.ndarray, 'leaves layers']:
    return processes.on_host(_largest(total))


def _choose(tiny: Bool[np.ndarray, ' layers'], scaled: PyTree, plain: PyTree) -> PyTree:
    """Return the scaled sums of the layers that are tiny, and the plain sums of the others."""
    return jax.tree.map(
        lambda new, old: jnp.where(tiny.reshape(-1, *[1] * (old.ndim - 1)), new, old),
        scaled,
        plain,
    )


def _finish(layer_sizes: tuple[int, ...], stat: Statistic, total: PyTree, tokens: Array) -> tuple[PyTree, Array]:
    """Return (sum or mean, tokens) of one kernel, with the layer axes that the kernel has."""
    if isinstance(stat, Mean):
        total = jax.tree.map(lambda leaf: leaf / tokens.astype(leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1)), total)
    # Accumulators always have one axis of layers.
    return jax.tree.map(lambda leaf: leaf.reshape(*layer_sizes, *leaf.shape[1:]), (total, tokens))


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
