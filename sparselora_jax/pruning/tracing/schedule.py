"""Cut a program at its kernels: which operations can run before which kernels are pruned.

A schedule is a list of steps. A `Segment` runs operations. A `Cut` names products whose inputs are now known, so that
their kernels can be pruned; the products themselves belong to a later segment, which reads the pruned kernels. A `Loop`
is a scan over layers, whose body has a schedule of its own. So every product runs once, on pruned inputs.

Operations on weights alone belong to no segment: each segment computes them from the weights of its time. So does each
with what takes weights out of a leaf at an index that depends on the samples.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax.extend import core

from sparselora_jax.pruning.tracing.operations import OF_BATCH, Operand, UnfollowedError, origins_after
from sparselora_jax.pruning.tracing.origin import Origin
from sparselora_jax.pruning.tracing.products import PRODUCTS, Product, find_product
from sparselora_jax.pruning.tracing.program import Program
from sparselora_jax.pruning.tracing.walk import CALLS, Walk, closed


class Unit(NamedTuple):
    """A kernel, or the layer of a stack, that is pruned at one cut.

    Attributes:
      path: path of the leaf; within a loop, that of the stack whose layer it is.
      pins: (axis of the argument, index) of each axis along which the program took one index.
    """

    path: str
    pins: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Segment:
    """Operations that run together for each chunk of samples.

    Attributes:
      equations: the operations, in order.
      inputs: values that it reads.
      outputs: values that it computes and that later steps read.
    """

    equations: list[core.JaxprEqn]
    inputs: list[core.Var]
    outputs: list[core.Var]


@dataclass(frozen=True)
class Cut:
    """Products whose kernels are pruned now.

    Attributes:
      equations: the products, or loops and branches that contain them, and what leads from the kernels to them.
      kernels: {unit: the value that holds it}.
      origins: {unit: the origin of that value}.
      copies: {unit: {other value that holds it: its origin}}.
      inputs: values that the equations read apart from the kernels.
    """

    equations: list[core.JaxprEqn]
    kernels: dict[Unit, core.Var]
    origins: dict[Unit, Origin]
    copies: dict[Unit, dict[core.Var, Origin]]
    inputs: list[core.Var]


@dataclass(frozen=True)
class Loop:
    """A scan over layers, each of which is pruned in turn.

    Attributes:
      equation: the scan.
      body: schedule of one layer.
      kernels: {path in the body: origin of the stack that it is a layer of}.
    """

    equation: core.JaxprEqn
    body: 'Schedule'
    kernels: dict[str, Origin]


Step = Segment | Cut | Loop


@dataclass(frozen=True)
class Schedule:
    """The steps of a program, or of the body of a loop.

    Attributes:
      program: the program, without calls.
      steps: what happens, in order.
      live: for each step, the values that later steps read.
      varying: values that depend on the samples.
      weight_operations: {value: the operation that computes it from weights alone, or that takes it out of a kernel at
        an index which depends on the samples}.
    """

    program: core.ClosedJaxpr
    steps: list[Step]
    live: list[set[core.Var]]
    varying: set[core.Var]
    weight_operations: dict[core.Var, core.JaxprEqn]

    def needed(self, values: Iterable[core.Var], known: Iterable[core.Var]) -> list[core.JaxprEqn]:
        """Return the operations on weights that lead to these values, in order.

        Args:
          values: values to compute.
          known: values that need no computation.
        """
        # Go back from the values to what they are computed from, until everything is known or an argument.
        missing = [value for value in values if value in self.weight_operations]
        found: set[int] = set()
        stop = set(known)
        while missing:
            value = missing.pop()
            equation = self.weight_operations.get(value)
            if value in stop or equation is None or id(equation) in found:
                continue
            found.add(id(equation))
            missing += _variables(equation.invars)
        return self.in_order(found)

    def in_order(self, equations: Collection[int]) -> list[core.JaxprEqn]:
        """Return operations in the order of the program, which defines each value before it is read.

        Args:
          equations: their identities.
        """
        return [equation for equation in self.program.jaxpr.eqns if id(equation) in equations]


def layer_axes(schedule: Schedule) -> dict[str, set[frozenset[int]]]:
    """Return {path: for each kernel of the leaf the axes along which it is one layer}.

    Args:
      schedule: a schedule.
    """
    axes: dict[str, set[frozenset[int]]] = {}
    for step in schedule.steps:
        if isinstance(step, Cut):
            for unit in step.kernels:
                axes.setdefault(unit.path, set()).add(frozenset(axis for axis, _ in unit.pins))
        elif isinstance(step, Loop):
            # In the body a layer is a kernel of its own, whose axes have other numbers than those of the leaf.
            for name, of_layer in layer_axes(step.body).items():
                layer = step.kernels[name].pin(0, None)
                pinned = {pin.axis for pin in layer.pins}
                in_leaf = [{part.axis for axis in of_kernel for part in layer.axes[axis]} for of_kernel in of_layer]
                axes.setdefault(layer.path, set()).update(frozenset(pinned | inner) for inner in in_leaf)
    return axes


def without_calls(program: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Return a program in which every call of another program is replaced by the operations of that program.

    Args:
      program: the program.
    """
    equations: list[core.JaxprEqn] = []
    constants: dict[core.Var, Any] = {}

    def inline(called: core.ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
        values: dict[core.Var, Any] = dict(zip(called.jaxpr.invars, arguments, strict=True))
        # Constants of the called program become constants of the whole.
        for variable, constant in zip(called.jaxpr.constvars, called.consts, strict=True):
            values[variable] = core.Var(variable.aval)
            constants[values[variable]] = constant

        def read(atom):
            return atom if isinstance(atom, core.Literal) else values[atom]

        for equation in called.jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            name = equation.primitive.name
            if name in CALLS:
                results = inline(closed(equation.params[CALLS[name]]), operands)
            elif steps := _steps_of_slice(equation):
                results = inline(steps, operands)
            else:
                # A program may be called twice, so each call needs variables of its own.
                results = [core.Var(variable.aval) for variable in equation.outvars]
                equations.append(equation.replace(invars=operands, outvars=results))
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in called.jaxpr.outvars]

    arguments = [core.Var(variable.aval) for variable in program.jaxpr.invars]
    results = inline(program, arguments)
    jaxpr = core.Jaxpr(list(constants), arguments, results, equations, program.jaxpr.effects, program.jaxpr.debug_info)
    return core.ClosedJaxpr(jaxpr, list(constants.values()))


def _steps_of_slice(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Return a slice `x[3, :, :8]` as `x[3]`, which is the layer to prune, and a part of it; None: it is one step.

    One index is taken at a time: of `x[3, :, 8]` the layer is `x[3]` if 8 is a column.

    Args:
      equation: any operation.
    """
    if equation.primitive.name != 'slice' or equation.params['strides'] is not None:
        return None
    (x,) = (variable.aval for variable in equation.invars)
    bounds = list(zip(equation.params['start_indices'], equation.params['limit_indices'], strict=True))
    is_index = [end - start == 1 < size for (start, end), size in zip(bounds, x.shape, strict=True)]
    steps = [{axis: bounds[axis]} for axis, of_axis in enumerate(is_index) if of_axis]
    parts = {axis: bound for axis, bound in enumerate(bounds) if not is_index[axis] and bound != (0, x.shape[axis])}
    if parts:
        steps.append(parts)
    if len(steps) < 2:
        return None

    def slice_by_steps(x):
        for step in steps:
            starts, ends = zip(*[step.get(axis, (0, size)) for axis, size in enumerate(x.shape)], strict=True)
            x = jax.lax.slice(x, starts, ends)
        return x

    return jax.make_jaxpr(slice_by_steps)(jax.ShapeDtypeStruct(x.shape, x.dtype))


def make_schedule(
    program: Program, *, is_pruned: Callable[[str], bool] = lambda path: True, needs_results: bool = False
) -> Schedule:
    """Return the schedule of a traced forward.

    Args:
      program: the forward.
      is_pruned: path of a kernel -> whether it is pruned; kernels that stay dense are values like others.
      needs_results: whether the results of the forward are needed.
    """
    flat = without_calls(program.jaxpr)
    origins = [origin if origin and is_pruned(origin.path) else None for origin in program.origins]
    varies = [index >= program.num_params for index in range(len(origins))]
    # What follows the last kernel, such as a head that stays dense, is not run for results that nobody reads.
    results = _variables(flat.jaxpr.outvars) if needs_results else []
    outputs = {path: frozenset(axes.outputs) for path, axes in program.axes.items()}
    return _Scheduler(flat, origins, varies, outputs, results=results).schedule()


@dataclass
class _Use:
    """How an operation uses kernels that are to be pruned.

    Attributes:
      units: the kernels that it multiplies with, or that operations inside it do.
      loop: the loop over layers that it is; None: it is none.
    """

    units: set[Unit] = field(default_factory=set)
    loop: Loop | None = None


class _Scheduler:
    """Builds the schedule of one program without calls."""

    def __init__(
        self,
        flat: core.ClosedJaxpr,
        origins: Sequence[Origin | None],
        varies: Sequence[bool],
        outputs: Mapping[str, Collection[int]],
        *,
        results: Sequence[core.Var],
    ):
        """Analyse a program.

        Args:
          flat: the program, without calls.
          origins: see `make_schedule`.
          varies: see `make_schedule`.
          outputs: {path: axes of outputs} of the kernels; what is sliced out of them is no layer.
          results: values that are needed in the end.
        """
        self.flat = flat
        self.outputs = outputs
        self.results = set(results)
        jaxpr = flat.jaxpr
        self.known: dict[core.Var, Operand] = {}
        for variable, origin, varying in zip(jaxpr.invars, origins, varies, strict=True):
            self.known[variable] = Operand(None, origin, OF_BATCH if varying else frozenset())
        for variable, constant in zip(jaxpr.constvars, flat.consts, strict=True):
            self.known[variable] = Operand(constant)
        # Literal indices stay known, so that the layer of `w[3]` is.
        self.producer: dict[core.Var, core.JaxprEqn] = {}
        self.weight_operations: dict[core.Var, core.JaxprEqn] = {}
        self.ordinary: list[core.JaxprEqn] = []
        self.uses: dict[int, _Use] = {}
        # A program may slice the same layer out of its stack several times.
        self.holders: dict[Unit, list[core.Var]] = {}
        for equation in jaxpr.eqns:
            self._analyse(equation)

    def _operand(self, atom: Any) -> Operand:
        return Operand(atom.val) if isinstance(atom, core.Literal) else self.known[atom]

    def _analyse(self, equation: core.JaxprEqn) -> None:
        """Find out which kernels an operation uses, and what its results are."""
        operands = [self._operand(atom) for atom in equation.invars]
        results: list[Origin | None] = [None] * len(equation.outvars)
        use = _Use()
        # Without an origin nothing leads to a kernel that is pruned.
        if any(operand.origin for operand in operands):
            name = equation.primitive.name
            if name in PRODUCTS:
                use = self._use_of_product(equation, operands)
            # A scan over stacked layers is walked; other loops run as a whole.
            elif name == 'scan' and (loop := self._loop(equation, operands)):
                use = _Use(loop=loop)
            elif name in ('scan', 'while', 'cond', 'shard_map'):
                use, results = self._use_of_control_flow(equation)
            else:
                # `trace` reported a kernel that is lost here, if it has no other product.
                with contextlib.suppress(UnfollowedError):
                    results = origins_after(equation, operands)
        is_used = bool(use.units) or use.loop is not None
        # What comes out of a product changes when its kernel is pruned, like what depends on the samples.
        varies = is_used or any(operand.varies for operand in operands)
        for variable, origin in zip(equation.outvars, results, strict=True):
            self.known[variable] = Operand(None, origin, OF_BATCH if varies else frozenset())
            self.producer[variable] = equation
            # Computed anew where it is needed: a value that was kept would be that of an unpruned kernel.
            if not varies or origin:
                self.weight_operations[variable] = equation
        if varies:
            self.ordinary.append(equation)
        if is_used:
            self.uses[id(equation)] = use

    def _use_of_product(self, equation: core.JaxprEqn, operands: Sequence[Operand]) -> _Use:
        try:
            product = find_product(equation, operands)
        except UnfollowedError:
            return _Use()
        index = next(index for index, operand in enumerate(operands) if operand.origin is product.origin)
        return _Use({self._unit(equation.invars[index])})

    def _use_of_control_flow(self, equation: core.JaxprEqn) -> tuple[_Use, list[Origin | None]]:
        """Find the kernels inside a loop or a branch: all of them are pruned together, before it runs.

        Returns:
          (the kernels, the origins of the results: a loop, or a `shard_map`, may only gather or split weights).
        """
        products: list[Product] = []
        # The walk sees the operation alone, with what is known of its operands.
        variables = list(dict.fromkeys(_variables(equation.invars)))
        walk = Walk(lambda product, sums: products.append(product), has_values=False)
        results = walk.run(self._alone(equation), [self._operand(variable) for variable in variables])
        paths = {product.path for product in products}
        followed = [variable for variable in variables if self.known[variable].origin is not None]
        use = _Use({self._unit(variable) for variable in followed if self.known[variable].origin.path in paths})
        return use, [None if use.units else result.origin for result in results]

    def _alone(self, equation: core.JaxprEqn) -> core.ClosedJaxpr:
        """Return a program of one operation."""
        unique = list(dict.fromkeys(_variables(equation.invars)))
        jaxpr = self.flat.jaxpr
        return core.ClosedJaxpr(
            core.Jaxpr((), unique, equation.outvars, [equation], equation.effects, jaxpr.debug_info), ()
        )

    def _unit(self, variable: core.Var) -> Unit:
        """Return the kernel that a value is a layout of, and note which value holds it."""
        origin = self.known[variable].origin
        # Go back to the value that holds just this layer, before it was transposed or cast.
        while variable in self.producer:
            equation = self.producer[variable]
            before = next(
                (
                    atom
                    for atom in _variables(equation.invars)
                    if self.known[atom].origin is not None and self.known[atom].origin.path == origin.path
                ),
                None,
            )
            if before is None:
                break
            # An index that only the running program knows says nothing here; then the whole stack is the kernel.
            # Nor does one that was taken together with a part of another axis, or one column.
            has_column = any(pin.axis in self.outputs.get(origin.path, ()) for pin in origin.pins)
            is_known = origin.is_whole and _has_known_indices(origin) and not self.known[variable].varies
            if is_known and not has_column and len(self.known[before].origin.pins) != len(origin.pins):
                break
            variable = before
            origin = self.known[variable].origin
        unit = Unit(origin.path, tuple(sorted((pin.axis, int(pin.index)) for pin in origin.pins)))
        held_by = self.holders.setdefault(unit, [])
        if variable not in held_by:
            held_by.append(variable)
        return unit

    def _loop(self, equation: core.JaxprEqn, operands: Sequence[Operand]) -> Loop | None:
        """Return a scan as a loop over layers; None: it reads kernels in another way, or none."""
        params = equation.params
        num_outer = params['num_consts'] + params['num_carry']
        # A kernel that every round reads is no layer. All rounds must have run before it can be pruned.
        if any(operand.origin for operand in operands[:num_outer]):
            return None
        body = without_calls(params['jaxpr'])
        origins: list[Origin | None] = [None] * num_outer
        kernels: dict[str, Origin] = {}
        outputs: dict[str, set[int]] = {}
        for operand, variable in zip(operands[num_outer:], body.jaxpr.invars[num_outer:], strict=True):
            origin = operand.origin
            of_layer = origin and origin.pin(0, None)
            # A layer that is pruned must be put back into the leaf, at a place that is known.
            has_place = of_layer and of_layer.is_whole and _has_known_indices(origin) and not operand.varies
            if origin and not has_place:
                return None
            # In the body, a layer is a kernel of its own. A second name keeps two parts of one leaf apart.
            name = origin and f'{origin.path}#{len(kernels)}'
            origins.append(origin and Origin.of_leaf(name, variable.aval.shape))
            if origin:
                kernels[name] = origin
                in_leaf = self.outputs.get(origin.path, ())
                outputs[name] = {
                    axis for axis, parts in enumerate(of_layer.axes) if any(part.axis in in_leaf for part in parts)
                }
        varies = [bool(operand.varies) for operand in operands]
        # The carry varies if any round makes it vary; to call it varying is always right.
        first_carry = params['num_consts']
        varies[first_carry:num_outer] = [True] * params['num_carry']
        schedule = _Scheduler(body, origins, varies, outputs, results=_variables(body.jaxpr.outvars)).schedule()
        # A loop without a kernel to prune runs as a whole.
        if not any(isinstance(step, Cut | Loop) for step in schedule.steps):
            return None
        return Loop(equation, schedule, kernels)

    def schedule(self) -> Schedule:
        """Return the schedule."""
        pruned: set[Unit] = set()
        steps: list[Step] = []
        remaining = self.ordinary
        while remaining:
            group, remaining = self._next_group(remaining, pruned)
            steps += group
        self._complete(steps)
        return Schedule(
            self.flat,
            steps,
            self._live_after(steps),
            {variable for variable, operand in self.known.items() if operand.varies},
            self.weight_operations,
        )

    def _next_group(self, equations: list[core.JaxprEqn], pruned: set[Unit]) -> tuple[list[Step], list[core.JaxprEqn]]:
        """Return the next steps, and the operations that come after them.

        Args:
          equations: operations that are not in a step yet, in order.
          pruned: units that are pruned already; those of these steps are added.
        """
        now: list[core.JaxprEqn] = []
        later: list[core.JaxprEqn] = []
        products: list[core.JaxprEqn] = []
        blocked: set[core.Var] = set()
        for index, equation in enumerate(equations):
            use = self.uses.get(id(equation), _Use())
            is_blocked = any(variable in blocked for variable in _variables(equation.invars))
            has_new_kernels = bool(use.units - pruned)
            # Program order is kept from here on: to go further would hold the inputs of far layers in memory.
            if (is_blocked and has_new_kernels) or (use.loop and (now or products or is_blocked)):
                later += equations[index:]
                break
            if use.loop:
                return [use.loop], equations[index + 1 :]
            # Kernels that read values known by now share this cut: q, k and v, or gate and up.
            if has_new_kernels:
                products.append(equation)
            if has_new_kernels or is_blocked:
                later.append(equation)
                blocked.update(equation.outvars)
            else:
                now.append(equation)
        steps: list[Step] = []
        if now:
            steps.append(Segment(now, [], []))
        if products:
            units = {unit for equation in products for unit in self.uses[id(equation)].units} - pruned
            cut = Cut(products, {}, {}, {}, [])
            for unit in sorted(units):
                # Values that hold the same kernel, also those that later operations read, become the pruned one.
                cut.kernels[unit], *others = self.holders[unit]
                cut.origins[unit] = self.known[cut.kernels[unit]].origin
                cut.copies[unit] = {variable: self.known[variable].origin for variable in others}
            pruned.update(units)
            steps.append(cut)
        return steps, later

    def _complete(self, steps: list[Step]) -> None:
        """Fill in what each step reads and computes."""
        # A schedule without order, of which only `needed` is used.
        schedule = Schedule(self.flat, steps, [], set(), self.weight_operations)
        # Values that hold pruned kernels: to compute them again would bring the unpruned ones back.
        holders: set[core.Var] = set()
        for step in steps:
            if isinstance(step, Loop):
                continue
            # The products of a cut begin at its kernels, which the caller brings.
            if isinstance(step, Cut):
                holders_of_step = {*step.kernels.values(), *(v for copies in step.copies.values() for v in copies)}
                stop = holders | holders_of_step
            else:
                stop = holders
            read = [variable for equation in step.equations for variable in _variables(equation.invars)]
            needed = schedule.needed(read, stop)
            step.equations[:] = schedule.in_order({id(equation) for equation in (*needed, *step.equations)})
            step.inputs[:] = free_variables(step.equations)
            if isinstance(step, Cut):
                holders |= holders_of_step
                step.inputs[:] = [variable for variable in step.inputs if variable not in holders_of_step]
        # From the end: what later steps read is what a segment has to return.
        read_later = set(self.results)
        for step in reversed(steps):
            if isinstance(step, Segment):
                computed = [variable for equation in step.equations for variable in equation.outvars]
                step.outputs[:] = [
                    variable for variable in computed if variable in read_later and self.known[variable].varies
                ]
            read_later |= self._read_by(step)

    def _read_by(self, step: Step) -> set[core.Var]:
        if isinstance(step, Loop):
            return set(_variables(step.equation.invars))
        return set(step.inputs)

    def _live_after(self, steps: Sequence[Step]) -> list[set[core.Var]]:
        """Return for each step the values that are read after it."""
        live: list[set[core.Var]] = []
        read = set(self.results)
        for step in reversed(steps):
            live.append(set(read))
            read |= self._read_by(step)
        return live[::-1]


def _has_known_indices(origin: Origin) -> bool:
    """Return whether the program says which layers were taken."""
    return all(pin.index is not None for pin in origin.pins)


def _variables(atoms: Sequence[Any]) -> list[core.Var]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def free_variables(equations: Sequence[core.JaxprEqn]) -> list[core.Var]:
    """Return the values that operations read and do not compute, in the order in which they are read.

    Args:
      equations: the operations.
    """
    computed: set[core.Var] = set()
    free: dict[core.Var, None] = {}
    for equation in equations:
        free.update((variable, None) for variable in _variables(equation.invars) if variable not in computed)
        computed.update(equation.outvars)
    return list(free)


def identity(program: core.ClosedJaxpr) -> tuple[str, tuple[int, ...]]:
    """Return a key that is equal for two programs which do the same.

    Args:
      program: a program without constants of its own.
    """
    # The text names values in the order in which they appear, so it does not depend on their identity. It leaves out
    # the constants of programs within programs, such as the branches of a `cond`, and which function a callback is.
    constants = []
    within = [program.jaxpr]
    while within:
        for equation in within.pop().eqns:
            called = CALLS.get(equation.primitive.name)
            # Rules of differentiation are functions too, and a new one for each call.
            params = equation.params[called] if called else equation.params
            for value in jax.tree.leaves(params):
                if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
                    constants += map(id, closed(value).consts)
                    within.append(closed(value).jaxpr)
                elif callable(value):
                    constants.append(id(value))
    return str(program.jaxpr), tuple(constants)


def function_of(
    equations: Sequence[core.JaxprEqn],
    inputs: Sequence[core.Var],
    outputs: Sequence[core.Var],
    whole: core.ClosedJaxpr,
) -> core.ClosedJaxpr:
    """Return operations as a program of their own.

    Args:
      equations: the operations.
      inputs: its arguments.
      outputs: its results.
      whole: the program that the operations are from.
    """
    effects = frozenset().union(*[equation.effects for equation in equations])
    jaxpr = core.Jaxpr((), list(inputs), list(outputs), list(equations), effects, whole.jaxpr.debug_info)
    return core.ClosedJaxpr(jaxpr, ())
