"""Sum statistics of every linear's input over calibration batches, without hooks in the model.

Every kernel is replaced by a `Calibrating` one. When `linear` multiplies with it, its `observe` adds the statistic of
the input to an accumulator and returns the plain kernel. The accumulator is a `jax.new_ref`, which `+=` updates
correctly under jit and scan.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import SparseloraError, calling
from sparselora_jax.sparse import rules, sharding
from sparselora_jax.sparse.weights import ReadByLinear

# `[tokens, inputs]` -> arrays that are sums over tokens. The statistics of two batches are added.
Statistic = Callable[[Array], Any]

# The callables that `make_observer` takes: the forward, the rows of a kernel's input that count, and the statistic of
# each path.
Forward = Callable[[dict, Any], Any]
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
    return getattr(stat, '__name__', repr(stat))


class Recorder:
    """Accumulators of one kernel (all its layers) while a forward is traced; compared by identity."""

    def __init__(self, stat: Statistic, layers: int, inputs: int, valid: Bool[Array, ' tokens'] | None):
        """Create accumulators of zeros.

        Args:
          stat: the statistic to accumulate.
          layers: number of layers of the stack that the kernel belongs to.
          inputs: length of its input axis.
          valid: True for the rows of the flattened input that are not padding; None: all rows count.
        """
        self.stat = stat
        self.valid = valid
        self.inputs: list[Array] = []
        self.total = jax.tree.map(
            lambda leaf: jax.new_ref(jnp.zeros((layers, *leaf.shape), jnp.float32)), statistic_shapes(stat, inputs)
        )
        self.tokens = jax.new_ref(jnp.zeros(layers, jnp.int32))

    def add(self, layer: Array, x: Float[Array, '*batch inputs']) -> None:
        """Add the statistic of one call's input, without padding."""
        # Stored so that `_leaders` can tell which kernels read the same array.
        self.inputs.append(x)
        rows = x.reshape(-1, x.shape[-1])
        count = jnp.asarray(rows.shape[0], jnp.int32)
        if self.valid is not None:
            # Rows of zeros add nothing to any sum; leaving rows out would make shapes depend on data.
            rows = jnp.where(self.valid.reshape(-1, 1), rows, jnp.zeros((), rows.dtype))
            count = jnp.sum(self.valid, dtype=jnp.int32)
        # The accumulator has the shape of one token's statistic. Anything but a sum would not fit, or be broadcast.
        for_one = statistic_shapes(self.stat, rows.shape[1])
        for_all = _shapes_of(self.stat, jax.ShapeDtypeStruct(rows.shape, rows.dtype))
        if jax.tree.map(jnp.shape, for_one) != jax.tree.map(jnp.shape, for_all):
            raise CalibrationError(
                f'statistic {name_of(self.stat)} of {len(rows)} tokens has other shapes than of one token: expected a '
                'sum over the tokens'
            )
        # `total` is a mutable ref: under scan the update lands in the layer's own row.
        for total, new in zip(jax.tree.leaves(self.total), jax.tree.leaves(self.stat(rows)), strict=True):
            total[layer] += new
        self.tokens[layer] += count


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Calibrating(ReadByLinear):
    """A kernel that reports its input before it is used; `layer` is sliced by scan together with the kernel."""

    kernel: Array
    layer: Array
    recorder: Recorder = field(metadata={'static': True})

    def observe(self, x: Float[Array, '*batch inputs']) -> Array:
        """Record x, and return the kernel to multiply with."""
        self.recorder.add(self.layer, x)
        return self.kernel


class Sums(NamedTuple):
    """Programs that sum the statistics of a forward over batches; kernels that read the same array share a sum.

    Attributes:
      zeros: `zeros(params, batch)` returns the initial sums.
      add: `add(sums, params, batch)` adds a batch to the sums; it is jitted, and the sums are donated.
      leaders: {path: path under which its sum is stored}, filled when `zeros` or `add` is traced.
    """

    zeros: Callable[[dict, Any], dict]
    add: Callable[[dict, dict, Any], dict]
    leaders: dict[str, str]

    def total(self, params: dict, batches: Iterable[Any]) -> dict[str, tuple[PyTree, Array]]:
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

    def observe(params, batch):
        flat = rules.flatten(params)
        recorders = {}
        for path, leaf in rules.kernels(params).items():
            stat = stats(path)
            if stat is None:
                continue
            # A stack [layers, in, out] holds one kernel per layer; the forward's scan slices it.
            stacked = leaf.ndim == 3
            layers = leaf.shape[0] if stacked else 1
            mask = valid(path, batch)
            mask = None if mask is None else mask.reshape(-1)
            recorders[path] = Recorder(stat, layers, leaf.shape[-2], mask)
            # Scan slices the index beside the kernel, so that `observe` knows its layer.
            index = jnp.arange(layers) if stacked else jnp.zeros((), jnp.int32)
            flat[path] = Calibrating(leaf, index, recorders[path])
        # The result is not used, so the compiler removes everything that no statistic depends on.
        forward(rules.unflatten(flat), batch)
        # A side effect of tracing: which kernels share an input is known only now.
        leaders.update(_leaders(recorders))
        own = {path: (r.total, r.tokens) for path, r in recorders.items() if leaders[path] == path}
        # Each device runs this on its own rows; the new leading axis has one entry for each device.
        return jax.tree.map(lambda ref: ref[...][None], own)

    observe = jax.jit(sharding.on_own_rows(observe, mesh))

    @functools.partial(jax.jit, donate_argnums=0)  # a Hessian is added to in place
    def add_statistics(sums, params, batch):
        return jax.tree.map(lambda total, parts: _add_in_order(total, parts, mesh), sums, observe(params, batch))

    def zeros(params, batch):
        # The shapes come from tracing the same function that `add_statistics` calls; nothing is compiled.
        shapes = observe.eval_shape(params, batch)
        return jax.tree.map(lambda s: jnp.zeros(s.shape[1:], s.dtype, device=place_of_sum(s.shape[1:], mesh)), shapes)

    return Sums(zeros, add_statistics, leaders)


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
) -> Callable[..., dict[str, tuple[PyTree, Array]]]:
    """Return `(params, batches) -> {path: (sum, tokens)}`, compiled once for batches of one shape.

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
        kernels = rules.kernels(params)
        stacked = {path: kernels[path].ndim == 3 for path in sums}
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
                messages = {path: DEAD.format(inputs=kernels[path].shape[-2]) for path in sums}
                _warn_about(dead, stacked, readers, place, messages)
        finished = {path: _finish(stacked[path], stats(path), *value) for path, value in sums.items()}
        return {path: finished[leader] for path, leader in programs.leaders.items()}

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
        # A kernel that is used more than once has a sum of its own.
        reads_once = len(recorder.inputs) == 1
        source = (id(recorder.inputs[0]), recorder.stat) if reads_once else path
        leaders[path] = first.setdefault(source, path)
    return leaders


def check_forward(forward: object) -> None:
    """Check that an object is a function that runs a model.

    Args:
      forward: what a user gave as a forward.

    Raises:
      CalibrationError: it cannot be called.
    """
    if not callable(forward):
        raise CalibrationError(
            f'forward is a {type(forward).__name__}: expected a function of (params, batch), such as model.hidden'
        )


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
    params: dict,
    batches: Iterable[Any],
    *,
    stat: Statistic = squares,
    valid: Callable[[Any], Array | None] | None = None,
    select: Callable[[str], bool] = lambda path: True,
) -> dict[str, tuple[PyTree, Array]]:
    """Run `forward` over the batches and sum up the statistic of every linear's input.

    Args:
      forward: `forward(weights, batch)`; its kernels are used through `sl.linear`. Its result is discarded.
      params: any nested dict with kernels.
      batches: what `forward` takes, of one shape.
      stat: `squares` or `hessian`, or any sum over tokens `[tokens, in] -> arrays`; `Mean` of one gives the mean.
      valid: batch -> True for the tokens that count, or None (all do); every linear must see these tokens.
      select: path -> whether to observe that kernel; Hessians of all kernels may not fit into memory.

    Returns:
      {path: (sum, tokens)}; the arrays have a leading layers axis if the kernel has one. If the squares of activations
      underflow in float32, the statistic is that of the activations times 2**64 (`make_observer`).

    Raises:
      CalibrationError: no batch, a kernel that the forward never used, or non-finite activations.

    >>> from sparselora_jax.sparse.linear import linear
    >>> params = {'q': {'kernel': jnp.ones((2, 3))}}
    >>> stats = collect(lambda w, x: linear(x, w['q']['kernel']), params, [jnp.array([[1.0, 2.0], [3.0, 4.0]])])
    >>> stats['q/kernel'][0].tolist(), int(stats['q/kernel'][1])
    ([10.0, 20.0], 2)
    """
    check_forward(forward)
    check_batches(batches)

    def valid_rows(path, batch):
        return None if valid is None else valid(batch)

    observe = make_observer(forward, stats=lambda path: stat if select(path) else None, valid=valid_rows)
    statistics = observe(params, batches)
    dead = {path: processes.on_host(count_dead_inputs(stat, total)) for path, (total, _) in statistics.items()}
    warn_about_dead_inputs(dead, rules.kernels(params))
    return statistics


def _check_sums(path: str, stacked: bool, total: PyTree, tokens: Int[Array, ' layers']) -> Bool[np.ndarray, ' layers']:
    """Check one kernel's sums, and return for which layers they are too small for float32.

    Raises:
      CalibrationError: no token reached the kernel, or its inputs were not finite.
    """
    if not processes.on_host(tokens).all():
        raise CalibrationError(f'{path}: no token reached it during calibration')
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


def warn_about_dead_inputs(counts: Mapping[str, Int[np.ndarray, '*layers']], kernels: Mapping[str, Any]) -> None:
    """Log one line for each kernel some of whose inputs are dead; `make_observer` names those of which all are.

    Args:
      counts: number of dead inputs, of each layer if the kernel is stacked, by path.
      kernels: anything with the shapes of the kernels, by path.
    """
    if not processes.first():
        return
    for path, of_layers in counts.items():
        inputs = kernels[path].shape[-2]
        partly = np.flatnonzero((of_layers > 0) & (of_layers < inputs))
        if not partly.size:
            continue
        most = int(np.reshape(of_layers, -1)[partly].max())
        place = path if np.ndim(of_layers) == 0 else f'{path}, {partly.size} of {len(of_layers)} layers'
        message = SOME_DEAD.format(dead=f'up to {most}' if partly.size > 1 else most, inputs=inputs)
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


def _finish(stacked: bool, stat: Statistic, total: PyTree, tokens: Array) -> tuple[PyTree, Array]:
    """Return (sum or mean, tokens) of one kernel, without the layers axis where the kernel has none."""
    if isinstance(stat, Mean):
        total = jax.tree.map(lambda leaf: leaf / tokens.astype(leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1)), total)
    # Accumulators always have a layers axis; that of a single kernel is dropped here.
    return (total, tokens) if stacked else jax.tree.map(lambda leaf: leaf[0], (total, tokens))


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
