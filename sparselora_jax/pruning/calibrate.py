"""Statistics of the inputs of each linear, streamed over calibration batches; a model needs no hook.

`bind`-like: every kernel is replaced by a `Calibrating` one, whose `observe` adds to an accumulator (`jax.new_ref`: a
`+=` that is correct under jit and scan) and hands the plain kernel on.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse import sharding


class CalibrationError(SparseloraError, ValueError):
    """A calibration set that says nothing, or activations that are not finite."""


def squares(x: Float[Array, 'tokens inputs']) -> Float[Array, ' inputs']:
    """Wanda's statistic: the sum of squares of each input, in fp32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=0)


def hessian(x: Float[Array, 'tokens inputs']) -> Float[Array, 'inputs inputs']:
    """SparseGPT's statistic: `x^T x`, in fp32."""
    x = x.astype(jnp.float32)
    return jnp.matmul(x.T, x, precision='highest')


@dataclass(frozen=True)
class Mean:
    """A statistic of which the mean over all tokens is handed on instead of the sum; equal where `stat` is."""

    stat: Callable[[Array], Any]

    def __call__(self, x: Float[Array, 'tokens inputs']) -> Any:
        """The sum over the tokens of one call, as of any statistic."""
        return self.stat(x)


class Recorder:
    """Accumulators of one kernel (all its layers) while a forward is traced; compared by identity."""

    def __init__(self, stat: Callable, layers: int, inputs: int, valid: Bool[Array, ' tokens'] | None):
        """Zeroed accumulators; `valid` marks the rows of x, flattened, that are no pads."""
        like = jax.eval_shape(stat, jax.ShapeDtypeStruct((1, inputs), jnp.float32))
        self.stat, self.valid, self.inputs = stat, valid, []
        self.total = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros((layers, *leaf.shape), jnp.float32)), like)
        self.tokens = jax.new_ref(jnp.zeros(layers, jnp.int32))

    def add(self, layer: Array, x: Float[Array, '*batch inputs']) -> None:
        """Adds the statistic of one call's input, pads left out."""
        self.inputs.append(x)
        rows = x.reshape(-1, x.shape[-1])
        count = jnp.asarray(rows.shape[0], jnp.int32)
        if self.valid is not None:
            rows = jnp.where(self.valid.reshape(-1, 1), rows, jnp.zeros((), rows.dtype))
            count = jnp.sum(self.valid, dtype=jnp.int32)
        for total, new in zip(jax.tree.leaves(self.total), jax.tree.leaves(self.stat(rows)), strict=True):
            total[layer] += new
        self.tokens[layer] += count


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Calibrating:
    """A kernel that reports its input before it is used; `layer` is sliced by scan together with the kernel."""

    kernel: Any
    layer: Any
    recorder: Recorder = field(metadata={'static': True})

    def observe(self, x: Float[Array, '*batch inputs']) -> Any:
        """Records x; returns the kernel to multiply with."""
        self.recorder.add(self.layer, x)
        return self.kernel


class Sums(NamedTuple):
    """Statistics of a forward as they are summed up over batches; one entry for kernels that read the same array.

    Attributes:
      zeros: `zeros(params, batch)`: what sums begin with.
      add: `add(sums, params, batch)`, jitted; the sums are donated.
      leaders: {path: the path that its sum goes by}, known once `zeros` or `add` is traced.
    """

    zeros: Callable[[dict, Any], dict]
    add: Callable[[dict, dict, Any], dict]
    leaders: dict[str, str]


def make_sums(
    forward: Callable[[dict, Any], Any],
    *,
    stats: Callable[[str], Callable[[Array], Any] | None],
    valid: Callable[[str, Any], Any] = lambda path, batch: None,
    mesh: Mesh | AbstractMesh | None = None,
) -> Sums:
    """The programs of `make_observer`, whose arguments these are."""
    leaders: dict[str, str] = {}

    def observe(params, batch):
        flat = rules_lib.flatten(params)
        recorders = {}
        for path, leaf in rules_lib.kernels(params).items():
            if (stat := stats(path)) is None:
                continue
            layers, mask = leaf.shape[0] if leaf.ndim == 3 else 1, valid(path, batch)
            mask = None if mask is None else mask.reshape(-1)
            recorders[path] = Recorder(stat, layers, leaf.shape[-2], mask)
            index = jnp.arange(layers) if leaf.ndim == 3 else jnp.zeros((), jnp.int32)
            flat[path] = Calibrating(leaf, index, recorders[path])
        forward(rules_lib.unflatten(flat), batch)
        leaders.update(_leaders(recorders))
        own = {path: (r.total, r.tokens) for path, r in recorders.items() if leaders[path] == path}
        return jax.tree.map(lambda ref: ref[...][None], own)

    observe = jax.jit(sharding.on_own_rows(observe, mesh))  # of each device: the leading axis

    @functools.partial(jax.jit, donate_argnums=0)  # a Hessian is added to in place
    def add_statistics(sums, params, batch):
        return jax.tree.map(lambda total, parts: _add_in_order(total, parts, mesh), sums, observe(params, batch))

    def zeros(params, batch):  # traces what `add_statistics` then calls; compiles nothing
        found = observe.eval_shape(params, batch)
        return jax.tree.map(lambda s: jnp.zeros(s.shape[1:], s.dtype, device=place_of_sum(s.shape[1:], mesh)), found)

    return Sums(zeros, add_statistics, leaders)


def make_observer(
    forward: Callable[[dict, Any], Any],
    *,
    stats: Callable[[str], Callable[[Array], Any] | None],
    valid: Callable[[str, Any], Any] = lambda path, batch: None,
    mesh: Mesh | None = None,
) -> Callable[[dict, Iterable[Any]], dict[str, tuple[Any, Array]]]:
    """`(params, batches) -> {path: (sum, tokens)}`, compiled once for batches of one shape.

    Kernels that read the very same array (q, k and v) have one accumulator, and the very same result.

    Args:
      stats: the statistic of a kernel's path, or None: it is not watched.
      valid: (path, batch) -> True for the rows of that kernel's input that count, or None (all do).
      mesh: over which the rows of all batches are split (`sharding.mesh_of_rows`). Each device runs `forward` on its
        own rows with whole weights, and what they find is added up in the order of the devices: the sums are, bit for
        bit, those of one device that is given their rows as batches, one after the other.
      forward: see `collect`, as for what is raised.
    """
    programs = make_sums(forward, stats=stats, valid=valid, mesh=mesh)

    def total(params, batches):
        sums = None
        for batch in batches:
            sums = programs.zeros(params, batch) if sums is None else sums
            sums = programs.add(sums, params, batch)
        if sums is None:
            raise CalibrationError('the calibration set is empty: no batch arrived')
        shapes = rules_lib.kernels(params)
        checked = {path: _checked(path, shapes[path].ndim == 3, stats(path), *value) for path, value in sums.items()}
        return {path: checked[leader] for path, leader in programs.leaders.items()}

    return total


def place_of_sum(shape: tuple[int, ...], mesh: Mesh | AbstractMesh | None) -> NamedSharding | None:
    """Where a sum, [layers, ...], lies: vectors on every device, of a Hessian some columns on each."""
    if mesh is None:
        return None
    columns = (None, None, *sharding.BATCH) if len(shape) == 3 else ()
    return sharding.fitting(mesh, PartitionSpec(*columns), shape)


def _add_in_order(total: Array, parts: Array, mesh: Mesh | AbstractMesh | None) -> Array:
    """`total + parts[0] + parts[1] + ...`, in this order; each device has one of the parts.

    Of Hessians a device is sent its columns of all of them: as many bytes as by a reduction, whose order is not known.
    """
    if mesh is None:
        return total + parts[0]
    place = PartitionSpec(None, *place_of_sum(parts.shape[1:], mesh).spec)
    parts = jax.lax.with_sharding_constraint(sharding.split_rows(parts, mesh), NamedSharding(mesh, place))
    return jax.lax.scan(lambda total, part: (total + part, None), total, parts)[0]


def _leaders(recorders: dict[str, Recorder]) -> dict[str, str]:
    """{path: the first path that read the same array}; a kernel that was read more than once stands for itself."""
    first: dict[Any, str] = {}
    return {
        path: first.setdefault((id(r.inputs[0]), r.stat) if len(r.inputs) == 1 else path, path)
        for path, r in recorders.items()
    }


def collect(
    forward: Callable[[dict, Any], Any],
    params: dict,
    batches: Iterable[Any],
    *,
    stat: Callable[[Array], Any] = squares,
    valid: Callable[[Any], Any] | None = None,
    select: Callable[[str], bool] = lambda path: True,
) -> dict[str, tuple[Any, Array]]:
    """Runs `forward` over the batches and sums the statistic of every linear's input.

    Args:
      forward: `forward(weights, batch)`; its kernels are used through `sl.linear`. Its result is discarded.
      stat: `squares` or `hessian`, or any sum over tokens `[tokens, in] -> arrays`; `Mean` of one gives the mean.
      valid: batch -> True for the tokens that count, or None (all do); every linear must see these tokens.
      select: which kernel paths to watch; a Hessian of each may not fit.

    Returns:
      {path: (sum, tokens)}, arrays with a leading layers axis where the kernel has one.

    Raises:
      CalibrationError: no batch, a kernel that the forward never used, or non-finite activations.

    >>> from sparselora_jax.linear import linear
    >>> params = {'q': {'kernel': jnp.ones((2, 3))}}
    >>> stats = collect(lambda w, x: linear(x, w['q']['kernel']), params, [jnp.array([[1.0, 2.0], [3.0, 4.0]])])
    >>> stats['q/kernel'][0].tolist(), int(stats['q/kernel'][1])
    ([10.0, 20.0], 2)
    """
    rows = (lambda path, batch: None) if valid is None else (lambda path, batch: valid(batch))
    observe = make_observer(forward, stats=lambda path: stat if select(path) else None, valid=rows)
    return observe(params, batches)


def _checked(path: str, stacked: bool, stat: Callable, total: Any, tokens: Array) -> tuple[Any, Array]:
    if not processes.on_host(tokens).all():
        raise CalibrationError(f'{path}: no token reached it during calibration')
    bad = processes.on_host(_not_finite(total))
    if bad.any():
        layer = f', layer {int(bad.argmax())}' if stacked else ''
        raise CalibrationError(f'{path}{layer}: activations are not finite during calibration')
    if isinstance(stat, Mean):
        total = jax.tree.map(lambda leaf: leaf / tokens.astype(leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1)), total)
    return (total, tokens) if stacked else jax.tree.map(lambda leaf: leaf[0], (total, tokens))


@jax.jit
def _not_finite(total: Any) -> Bool[Array, ' layers']:
    finite = [jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(total)]
    return ~jnp.stack(finite).all(axis=0)
