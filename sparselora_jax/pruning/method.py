"""The interface of a pruning method, and the registry of the methods that a recipe may name.

To add a method, write a frozen dataclass that implements `Method` in a file of its own, and register it in
`pruning/__init__.py`. A recipe may also name a class that is not registered, with `config.prune.method =
'package.module:Name'`.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.calibrate import Statistic
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.runtime.registry import Registry
from sparselora_jax.sparse.patterns import Pattern


class MethodError(SparseloraError, TypeError):
    """An object that is not a pruning method, or that lacks a member of `Method`."""


@runtime_checkable
class Method(Protocol):
    """One pruning method: a frozen dataclass of its options that maps (kernel, statistic, pattern) to (kernel, mask).

    Kernels are `[inputs, outputs]`, one layer at a time. A method is called inside a jitted program, so it must be
    hashable, and equal to another method with the same options. Subclass `Method` to inherit the defaults below.

    A recipe fills the fields of the dataclass by name: `group` from `config.prune.group` of the tower, `seed` from
    `config.seed`, `initial` with the method that `config.prune.initial` names, any other field from
    `config.prune.<field>`. A field that the config does not have keeps its default.

    Attributes:
      statistic: what to sum over the calibration tokens of each kernel's input, such as `calibrate.squares`, or
        `calibrate.Mean` of such a sum; None: the method needs no data.
      group: comparison group of unstructured patterns. `'output'`: the inputs of one output are compared; the number
        of zeros is then given for each output. Anything else: the number of zeros is given for the whole kernel.
      edits_kept_weights: whether kept weights differ from the dense ones. If so the job stores the pruned kernels;
        if not, it stores the masks alone. It is an error if a method says False but edits them.
      outputs_are_independent: whether the result for one output depends only on that output's weights and the
        statistic, given its number of zeros. If so, kernels that read the same input (q, k, v) are concatenated and
        pruned together. Scores that are normalised over outputs are not independent; nor are random numbers drawn for
        the whole kernel.
      chooses_mask: whether its masks have exactly the zeros that `num_zeros` or the N:M pattern says, which is checked.
        False: the kernels that it gets are pruned already, so N:M groups may have more zeros; no recipe can name it.
      groups: maps each value of `config.prune.group` (`output`, `matrix`) to the value of the method's own `group`.
      kernel_copies: float32 arrays of a kernel's size that exist at once while it is pruned (weights, scores, ranks);
        for estimates of memory.
      statistic_copies: arrays of the statistic's size that the method makes, such as the factor and the inverse of a
        Hessian; for estimates of memory.
    """

    # Required members; data members of a Protocol may be fields, ClassVars or properties.
    statistic: Statistic | None
    group: str
    edits_kept_weights: ClassVar[bool]
    outputs_are_independent: bool
    # Defaults, which subclasses of `Method` inherit.
    chooses_mask: ClassVar[bool] = True
    groups: ClassVar[Mapping[str, str]] = MappingProxyType({'output': 'output', 'matrix': 'matrix'})
    kernel_copies: ClassVar[int] = 4
    statistic_copies: int = 0

    def check(self, pattern: Pattern, inputs: int) -> None:
        """Check, before any work, that the method supports a pattern; the default supports all.

        Args:
          pattern: unstructured or N:M, never dense.
          inputs: length of the kernel's input axis.

        Raises:
          PatternError: it does not.
        """

    def __call__(
        self,
        kernel: Float[Array, 'inputs outputs'],
        statistic: PyTree,
        pattern: Pattern,
        num_zeros: ArrayLike | None = None,
    ) -> tuple[Float[Array, 'inputs outputs'], Bool[Array, 'inputs outputs']]:
        """Prune one kernel.

        Args:
          kernel: dense weights.
          statistic: the collected statistic; None for a method without one.
          pattern: unstructured or N:M. Where `num_zeros` is given, it replaces the pattern's sparsity.
          num_zeros: number of zeros of each output, `[outputs]`, or of the whole kernel (see `group`). It is traced, so
            a new sparsity does not recompile. None: the pattern is N:M, or its own sparsity applies.

        Returns:
          (kernel with exact zeros where the mask is False, mask: True = kept).

        Raises:
          CalibrationError: the statistic is not the one that the method needs (`check_statistic`).
        """
        ...


# Names of `Method` classes for `config.prune.method` and `config.prune.initial`.
METHODS: Registry[type] = Registry('prune.method')

# isinstance(method, Method) does not say which member is missing; these names do.
_MEMBERS = (
    'statistic',
    'group',
    'edits_kept_weights',
    'outputs_are_independent',
    'chooses_mask',
    'groups',
    'kernel_copies',
    'statistic_copies',
    'check',
)

# Members that describe `__call__`: one that is inherited beside a new `__call__` would be believed without reason.
_SAID_OF_CALL = ('edits_kept_weights', 'outputs_are_independent')


def check_method(method: object) -> None:
    """Check that an object can be used as a pruning method.

    Args:
      method: what a user gave as a method.

    Raises:
      MethodError: names what is wrong and what to write instead.
    """
    # The most likely mistakes: a name, or a class instead of an instance.
    if isinstance(method, str | type) or not callable(method):
        name = method if isinstance(method, str) else getattr(method, '__name__', type(method).__name__)
        raise MethodError(f'pruning method {name}: expected an instance such as sl.Wanda(), not {method!r}')
    name = type(method).__name__
    missing = [member for member in _MEMBERS if not hasattr(method, member)]
    if missing:
        raise MethodError(
            f'pruning method {name} does not say {", ".join(missing)}: define them, or subclass '
            'sparselora_jax.pruning.Method, which has defaults for some'
        )
    if silent := _inherited_beside_own_call(type(method), vars(method) if hasattr(method, '__dict__') else {}):
        lines = '; '.join(f'{member}: ClassVar[bool] = False (or True, see pruning.Method)' for member in silent)
        raise MethodError(
            f'pruning method {name} has its own __call__ and inherits {" and ".join(silent)}, which may not be true of '
            f'it; add: {lines}'
        )
    for member in _SAID_OF_CALL:
        if not isinstance(getattr(method, member), bool | np.bool_):
            raise MethodError(f'pruning method {name}: {member} is {getattr(method, member)!r}: expected True or False')
    if not isinstance(method.groups, Mapping):
        raise MethodError(f'pruning method {name}: groups is {method.groups!r}: expected a dict, see pruning.Method')
    if method.statistic is not None and not callable(method.statistic):
        raise MethodError(
            f'pruning method {name}: statistic is {method.statistic!r}: expected None or a function such as '
            'staticmethod(calibrate.squares)'
        )
    if inspect.ismethod(method.statistic):
        # A plain function as a class attribute becomes a method of the object when it is read.
        raise MethodError(
            f'pruning method {name}: statistic is bound to the method itself; write '
            f'statistic = staticmethod({method.statistic.__name__})'
        )
    try:
        hash(method)
    except TypeError:
        # jit compiles a program for each method, and finds it again by the method's hash.
        raise MethodError(f'pruning method {name} cannot be hashed: make it a frozen dataclass') from None


def _inherited_beside_own_call(kind: type, own: Mapping[str, Any]) -> list[str]:
    """Return the members about `__call__` that a class inherits although it has another `__call__` than its parent.

    Args:
      kind: class of the method.
      own: attributes of the object itself.
    """
    classes = kind.__mro__
    caller = next(index for index, cls in enumerate(classes) if '__call__' in vars(cls))
    # A member may be said by a value, or be a field of a dataclass without one.
    said = {name for cls in classes[: caller + 1] for name in (*vars(cls), *vars(cls).get('__annotations__', ()))}
    return [member for member in _SAID_OF_CALL if member not in said and member not in own]


def check_statistic(
    method: Method, statistic: PyTree, inputs: int, *, layers: Sequence[int] = (), path: str | None = None
) -> None:
    """Check that a statistic has the shapes of the one that a method needs.

    Without this check a Hessian given to Wanda would broadcast against the scores without an error.

    Args:
      method: a method with a statistic.
      statistic: what was given to it.
      inputs: length of the kernel's input axis.
      layers: `(layers,)` for a stacked kernel, otherwise empty.
      path: path of the kernel, for the message.

    Raises:
      CalibrationError: it has other shapes; names the statistic that is expected and the one that was found.
    """
    expected = _shapes(calibrate.statistic_shapes(method.statistic, inputs), layers)
    if _shapes(statistic) == expected:
        return
    # Find the name of the statistic that was given, for the message.
    known = [other for other in (calibrate.squares, calibrate.hessian) if other is not method.statistic]
    found = [
        calibrate.name_of(other)
        for other in known
        if _shapes(calibrate.statistic_shapes(other, inputs), layers) == _shapes(statistic)
    ]
    name = type(method).__name__
    raise calibrate.CalibrationError(
        f'{f"{path}: " if path else ""}{name} expects the statistic {calibrate.name_of(method.statistic)} of shape '
        f'{_sizes(expected)} and found {found[0] if found else "one"} of shape {_sizes(_shapes(statistic))}; '
        f'run collect with stat={name}().statistic'
    )


def _shapes(statistic: PyTree, layers: Iterable[int] = ()) -> tuple[Any, list[tuple[int, ...]]]:
    """Return (structure, shapes) of a statistic, with a leading layers axis in front of each shape."""
    leaves, structure = jax.tree.flatten(statistic)
    return structure, [(*layers, *np.shape(leaf)) for leaf in leaves]


def _sizes(shapes: tuple[Any, list[tuple[int, ...]]]) -> str:
    return ', '.join(str(list(shape)) for shape in shapes[1])


def prunes_jointly(method: Method, pattern: Pattern) -> bool:
    """Return whether kernels that read the same input can be pruned together without changing the result.

    Args:
      method: the method of all these kernels.
      pattern: the pattern of all these kernels.
    """
    # If the group is the whole matrix, outputs compete for zeros, so joined kernels would compete with each other.
    outputs_compete = not pattern.structured and method.group != 'output'
    # Without a statistic nothing is shared, so nothing is saved.
    return method.statistic is not None and method.outputs_are_independent and not outputs_compete
