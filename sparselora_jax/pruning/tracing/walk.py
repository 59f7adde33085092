"""Run a traced program operation by operation, and visit each product that reads a leaf of params."""

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from sparselora_jax.pruning.tracing.devices import NOTES, divide, join, mesh_axes_by_axis, mesh_axes_of, varies_after
from sparselora_jax.pruning.tracing.operations import (
    BATCH,
    Operand,
    UnfollowedError,
    looked_up_after,
    origins_after,
)
from sparselora_jax.pruning.tracing.origin import Origin
from sparselora_jax.pruning.tracing.products import PRODUCTS, Product, find_product

# Operations that call one program, and the parameter that holds it. Nothing is differentiated here, so the rules of
# `custom_jvp` and `custom_vjp`, and what `remat` saves, do not matter.
CALLS = {
    'checkpoint': 'jaxpr',
    'closed_call': 'call_jaxpr',
    'core_call': 'call_jaxpr',
    'custom_jvp_call': 'call_jaxpr',
    'custom_vjp_call': 'call_jaxpr',
    'jit': 'jaxpr',
    'remat2': 'jaxpr',
}


# `visit(product, sums)`: see `Program.run`.
Visit = Callable[[Product, PyTree], None]


class Walk:
    """One pass over a program: with values, or without to analyse it.

    Attributes:
      lost: {path: what lost the leaf}, of all leaves that reached an operation that cannot be followed.
      unfollowed: the same, of leaves that reached a product, or were lost on the way to one.
    """

    def __init__(self, visit: Visit, *, has_values: bool, sums: PyTree = (), mesh_axes: tuple[Hashable, ...] = ()):
        """Create a walk.

        Args:
          visit: called with each product of a leaf.
          has_values: whether operands have values, and operations are to be run.
          sums: see `Program.run`.
          mesh_axes: axes of the mesh whose devices run the program; none outside of `shard_map`.
        """
        self.visit = visit
        self.has_values = has_values
        self.lost: dict[str, str] = {}
        self.unfollowed: dict[str, str] = {}
        self._sums = sums
        self._mesh_axes = mesh_axes
        self._is_on_some_devices = False
        self._callers: list[core.JaxprEqn] = []
        self._scope: object = None
        self._notes: dict[tuple, tuple[list[Any], list[Any]]] = {}

    def run(self, program: core.ClosedJaxpr, operands: Sequence[Operand]) -> list[Operand]:
        """Run a program and return its results.

        Args:
          program: the program.
          operands: its arguments.
        """
        self._debug_info = program.jaxpr.debug_info
        constants = [Operand(constant) for constant in program.consts]
        variables = dict(zip(program.jaxpr.constvars, constants, strict=True))
        variables.update(zip(program.jaxpr.invars, operands, strict=True))

        def read(atom):
            return Operand(atom.val) if isinstance(atom, core.Literal) else variables[atom]

        for equation in program.jaxpr.eqns:
            results = self._run_equation(equation, [read(atom) for atom in equation.invars])
            variables.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in program.jaxpr.outvars]

    def _run_equation(self, equation: core.JaxprEqn, operands: list[Operand]) -> list[Operand]:
        # An operation on other values runs as it is.
        origins: list[Origin | None] = [None] * len(equation.outvars)
        followed = [operand.origin for operand in operands if operand.origin is not None]
        name = equation.primitive.name
        # What varies between devices is known only after every operation within has been seen.
        # What is taken from an array at an index is no value of the index.
        sources = operands[:1] if name in ('dynamic_slice', 'gather') else operands
        lost = frozenset().union(*[operand.lost for operand in sources])
        is_entered = bool(followed or self._mesh_axes or (lost and not self.has_values))
        if is_entered and name in CALLS:
            self._callers.append(equation)
            results = self.run(closed(equation.params[CALLS[name]]), operands)
            self._callers.pop()
            return results
        if is_entered and name in _CONTROL_FLOW:
            return _CONTROL_FLOW[name](self, equation, operands)
        if followed:
            try:
                if name in PRODUCTS:
                    self._visit_product(equation, operands)
                else:
                    origins = origins_after(equation, operands)
            except UnfollowedError as reason:
                place = f'{name} ({self._line_of(equation)})'
                lost = lost.union(origin.path for origin in followed)
                for origin in followed:
                    # The first operation that lost a leaf is the one to name.
                    self.lost.setdefault(origin.path, f'{place}: {reason}')
                    if name in PRODUCTS:
                        self.unfollowed.setdefault(origin.path, f'{place}: {reason}')
        values = self._noted(equation, operands) if name in NOTES else self._bind(equation, operands)
        varies = varies_after(equation, frozenset().union(*[operand.varies for operand in operands]))
        if name in PRODUCTS:
            self._note_lost_kernels(operands, varies)
            self._note_looked_up_kernels(equation, operands)
            # What a product returns is no weight any more.
            lost = frozenset()
        looked_up = looked_up_after(equation, operands)
        return [Operand(value, origin, varies, lost, looked_up) for value, origin in zip(values, origins, strict=True)]

    def _note_lost_kernels(self, operands: Sequence[Operand], varies: frozenset[Hashable]) -> None:
        """Note the leaves that a product multiplies with data, after another operation has lost them."""
        # A value that varies with the batch is an input itself, such as what an embedding has looked up.
        weights = [operand for operand in operands if BATCH in varies and BATCH not in operand.varies]
        for path in sorted(frozenset().union(*[operand.lost for operand in weights])):
            # What an analysis of a part has lost, the walk over the whole names.
            if path in self.lost:
                self.unfollowed.setdefault(path, self.lost[path])

    def _note_looked_up_kernels(self, equation: core.JaxprEqn, operands: Sequence[Operand]) -> None:
        """Note the leaves of which a product multiplies each token with a matrix of its own, such as its expert."""
        if equation.primitive.name != 'dot_general':
            return
        contracted, batch = equation.params['dimension_numbers']
        for index, (operand, other) in enumerate(zip(operands, operands[::-1], strict=True)):
            # Two weights make another weight, or the input of a kernel.
            if operand.looked_up is None or BATCH not in other.varies:
                continue
            path = operand.looked_up.path
            of_matrix = {axis for axis, parts in enumerate(operand.looked_up.axes) if parts}
            inputs = of_matrix.intersection(contracted[index])
            # Without outputs it is a vector for each token, such as what an embedding has in heads.
            if inputs and of_matrix.difference(inputs, batch[index]) and path in self.lost:
                self.unfollowed.setdefault(path, self.lost[path])

    def _visit_product(self, equation: core.JaxprEqn, operands: Sequence[Operand]) -> None:
        # An exchange that only some devices reach would never end; the analysis has found that the kernel is lost.
        if self._is_on_some_devices and self.has_values:
            return
        product = find_product(equation, operands, self._mesh_axes)
        placement = replace(product.placement, some_devices=self._is_on_some_devices)
        self.visit(replace(product, scope=self._scope, placement=placement), self._sums)

    def _run_body(
        self, body: core.ClosedJaxpr, operands: Sequence[Operand], decided_by: frozenset[Hashable] = frozenset()
    ) -> list[Operand]:
        """Run the body of a loop, or a branch: its products are not always run together with those around it.

        Args:
          body: the body.
          operands: its arguments.
          decided_by: what the number of rounds, or the choice of the branch, varies with.
        """
        outer = self._scope, self._is_on_some_devices
        self._scope = object()
        self._is_on_some_devices |= bool(decided_by - {BATCH})
        results = self.run(body, operands)
        self._scope, self._is_on_some_devices = outer
        return results

    def _line_of(self, equation: core.JaxprEqn) -> str:
        """Return where in the user's code an operation was written."""
        of_jax = os.path.dirname(jax.__file__)
        # Functions of JAX such as `jnp.sort` are programs of their own, which only their callers place.
        for caller in (equation, *reversed(self._callers)):
            traceback = caller.source_info.traceback
            for frame in traceback.frames if traceback else ():
                if not frame.file_name.startswith((of_jax, '<')):
                    return f'{frame.file_name}:{frame.line_num}'
        return 'unknown line'

    def _bind(self, equation: core.JaxprEqn, operands: Sequence[Operand]) -> list[Any]:
        """Run one operation as it is, and return the values of its results."""
        if not self.has_values:
            return [None] * len(equation.outvars)
        variables = [atom for atom in equation.invars if not isinstance(atom, core.Literal)]
        values = [
            operand.value
            for atom, operand in zip(equation.invars, operands, strict=True)
            if not isinstance(atom, core.Literal)
        ]
        # A program of this one operation: JAX knows how to run it in the right context.
        alone = core.Jaxpr((), variables, equation.outvars, [equation], equation.effects, self._debug_info)
        return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*values)

    def _noted(self, equation: core.JaxprEqn, operands: Sequence[Operand]) -> list[Any]:
        """Return the results of a note, the same for the same array, so that its readers still read one array."""
        values = [operand.value for operand in operands]
        key = (*map(id, values), mesh_axes_of(equation), self._scope)
        if key not in self._notes:
            # The values are held too, since the identity of one that is gone may be given to another.
            self._notes[key] = (values, self._bind(equation, operands))
        return self._notes[key][1]

    def _analyse(self, program: core.ClosedJaxpr, operands: Sequence[Operand]) -> list[Operand]:
        """Return the results of a program without values: their origins and what varies."""
        analysis = Walk(lambda product, sums: None, has_values=False, mesh_axes=self._mesh_axes)
        return analysis.run(program, _without_values(operands))

    def _invariant(
        self,
        equation: core.JaxprEqn,
        body: core.ClosedJaxpr,
        before: Sequence[Operand],
        carry: Sequence[Operand],
        after: Sequence[Operand],
    ) -> list[Operand]:
        """Return what is known of a loop's carry in every round, without values.

        Weights may pass through a loop unchanged, in its carry. What changes from round to round loses its origin.

        Args:
          equation: the loop.
          body: its body, whose first results are the next carry.
          before: arguments before the carry.
          carry: the first carry.
          after: arguments after the carry.
        """
        known = _without_values(carry)
        # Each round can only lose origins, so this ends.
        while True:
            results = self._analyse(body, [*before, *known, *after])[: len(known)]
            weaker = []
            for old, new in zip(known, results, strict=True):
                operand = self._followed(equation, old, _common_origin([old, new]))
                weaker.append(operand._replace(varies=old.varies | new.varies, lost=operand.lost | new.lost))
            if [_summary(operand) for operand in weaker] == [_summary(operand) for operand in known]:
                return known
            known = weaker

    def _scan(self, equation: core.JaxprEqn, operands: list[Operand]) -> list[Operand]:
        params = equation.params
        body = params['jaxpr']
        num_consts = params['num_consts']
        num_carry = params['num_carry']
        consts = operands[:num_consts]
        carry = operands[num_consts : num_consts + num_carry]
        stacked = operands[num_consts + num_carry :]
        # The first layer stands for all of them.
        slices = [_slice_of(operand, None, None) for operand in stacked]
        for operand, layer in zip(stacked, slices, strict=True):
            if operand.origin and not layer.origin:
                reason = 'its layers are no axis of the leaf'
                self.lost.setdefault(operand.origin.path, f'scan ({self._line_of(equation)}): {reason}')
        known = self._invariant(equation, body, consts, carry, slices)
        if not self.has_values:
            results = self.run(body, [*consts, *known, *slices])
            return [*known, *[self._followed(equation, result, None) for result in results[num_carry:]]]
        # The stacked results have no origin, but what varies in them is needed.
        results = self._analyse(body, [*consts, *known, *slices])

        def run_layer(state, values):
            index, carry_values = state
            position = params['length'] - 1 - index if params['reverse'] else index
            of_layer = [_slice_of(operand, value, position) for operand, value in zip(stacked, values, strict=True)]
            inner_carry = [operand._replace(value=value) for operand, value in zip(known, carry_values, strict=True)]
            outputs = self._run_body(body, [*consts, *inner_carry, *of_layer])
            new_values = [operand.value for operand in outputs]
            return (index + 1, new_values[:num_carry]), new_values[num_carry:]

        first = (jnp.zeros((), jnp.int32), [operand.value for operand in carry])
        (_, carry_values), stacks = jax.lax.scan(
            run_layer,
            first,
            [operand.value for operand in stacked],
            length=params['length'],
            reverse=params['reverse'],
            unroll=params['unroll'],
        )
        last = [operand._replace(value=value) for operand, value in zip(known, carry_values, strict=True)]
        outputs = [
            Operand(value, None, result.varies) for value, result in zip(stacks, results[num_carry:], strict=True)
        ]
        return [*last, *outputs]

    def _while(self, equation: core.JaxprEqn, operands: list[Operand]) -> list[Operand]:
        params = equation.params
        num_cond = params['cond_nconsts']
        num_consts = num_cond + params['body_nconsts']
        cond_consts = operands[:num_cond]
        body_consts = operands[num_cond:num_consts]
        carry = operands[num_consts:]
        body = params['body_jaxpr']
        known = self._invariant(equation, body, body_consts, carry, [])
        (condition,) = self._analyse(params['cond_jaxpr'], [*cond_consts, *known])
        # What a loop changes varies between devices that run another number of rounds.
        uneven = condition.varies - {BATCH}
        after = [operand if operand.origin else operand._replace(varies=operand.varies | uneven) for operand in known]
        if not self.has_values:
            self._run_body(body, [*body_consts, *known], uneven)
            return after

        def run_condition(values):
            # Its products decide only when to stop, so nothing is followed there.
            constants = [operand.value for operand in cond_consts]
            (goes_on,) = core.jaxpr_as_fun(params['cond_jaxpr'])(*constants, *values)
            return goes_on

        def run_round(values):
            inner = [operand._replace(value=value) for operand, value in zip(known, values, strict=True)]
            return [operand.value for operand in self._run_body(body, [*body_consts, *inner], uneven)]

        values = jax.lax.while_loop(run_condition, run_round, [operand.value for operand in carry])
        return [operand._replace(value=value) for operand, value in zip(after, values, strict=True)]

    def _cond(self, equation: core.JaxprEqn, operands: list[Operand]) -> list[Operand]:
        index, *arguments = operands
        branches = equation.params['branches']
        of_branches = [self._analyse(branch, arguments) for branch in branches]
        # A result has an origin only if all branches agree.
        known = []
        for results in zip(*of_branches, strict=True):
            origin = _outside(_common_origin(results), arguments)
            # Where devices take different branches, even equal results of a branch differ.
            varies = index.varies.union(*[result.varies for result in results])
            result = self._followed(equation, results[0], origin)
            lost = result.lost.union(*[other.lost for other in results])
            known.append(Operand(None, origin, varies, lost))
        if not self.has_values:
            for branch in branches:
                self._run_body(branch, arguments, index.varies)
            return known

        # Operands are captured and not passed, so that they keep their origins.
        def runner(branch):
            return lambda: [operand.value for operand in self._run_body(branch, arguments, index.varies)]

        values = jax.lax.switch(index.value, [runner(branch) for branch in branches])
        return [operand._replace(value=value) for operand, value in zip(known, values, strict=True)]

    def _shard_map(self, equation: core.JaxprEqn, operands: list[Operand]) -> list[Operand]:
        params = equation.params
        mesh = params['mesh']
        own_axes = params['newly_manual_axes']
        body = closed(params['jaxpr'])
        on_device = []
        for operand, spec in zip(operands, params['in_specs'], strict=True):
            # What is divided differs from device to device; what is replicated does not.
            varies = operand.varies.union(*mesh_axes_by_axis(spec).values())
            divided = self._followed(equation, operand, divide(operand.origin, spec, mesh))
            on_device.append(divided._replace(varies=varies))
        # Set when the body is traced: JAX passes on values only.
        results: list[Operand] = []

        def run_on_device(sums, values):
            nonlocal results
            outer = self._sums, self._mesh_axes
            # Within one `shard_map` there may be another, along further axes of the mesh.
            self._sums = sums
            self._mesh_axes += tuple(axis for axis in mesh.axis_names if axis in own_axes)
            inner = [operand._replace(value=value) for operand, value in zip(on_device, values, strict=True)]
            results = self._run_body(body, inner)
            self._sums, self._mesh_axes = outer
            return [result.value for result in results]

        run = run_on_device
        if self.has_values:
            # References can only enter as arguments. All devices add the same to them, so they stay replicated.
            run = jax.shard_map(
                run_on_device,
                mesh=mesh,
                in_specs=(PartitionSpec(), list(params['in_specs'])),
                out_specs=list(params['out_specs']),
                axis_names=own_axes,
                check_vma=params['check_vma'],
            )
        values = run(self._sums, [operand.value for operand in operands])
        joined = []
        for result, variable, spec, value in zip(results, body.jaxpr.outvars, params['out_specs'], values, strict=True):
            origin = join(result.origin, spec, mesh, own_axes, variable.aval.shape)
            outside = self._followed(equation, result, _outside(origin, operands))
            joined.append(outside._replace(value=value, varies=result.varies - own_axes))
        return joined

    def _followed(self, equation: core.JaxprEqn, operand: Operand, origin: Origin | None) -> Operand:
        """Return an operand with another origin; note that its leaf is lost if there is none."""
        if operand.origin and not origin:
            place = f'{equation.primitive.name} ({self._line_of(equation)})'
            self.lost.setdefault(operand.origin.path, f'{place}: {_CHANGED[equation.primitive.name]}')
            return operand._replace(origin=None, lost=operand.lost | {operand.origin.path})
        return operand._replace(origin=origin)


# Why a leaf is lost where it enters or leaves a body.
_CHANGED = {
    'scan': 'the loop changes it from round to round, or returns it once for each round',
    'while': 'the loop changes it from round to round',
    'cond': 'its branches return different parts of the leaf, or an index that is known only within',
    'shard_map': 'a device holds no part of whole axes of the leaf, or an index that is known only within',
}
_CONTROL_FLOW = {'scan': Walk._scan, 'while': Walk._while, 'cond': Walk._cond, 'shard_map': Walk._shard_map}


def closed(program: core.ClosedJaxpr | core.Jaxpr) -> core.ClosedJaxpr:
    """Return a program that is called by an operation as one with its constants.

    Args:
      program: the program, as `CALLS` names it.
    """
    return program if isinstance(program, core.ClosedJaxpr) else core.ClosedJaxpr(program, ())


def _without_values(operands: Sequence[Operand]) -> list[Operand]:
    return [operand._replace(value=None) for operand in operands]


def _common_origin(operands: Sequence[Operand]) -> Origin | None:
    """Return the origin that all operands have; None: they differ."""
    first = operands[0].origin
    return first if first and all(first.is_same_as(operand.origin) for operand in operands) else None


def _outside(origin: Origin | None, operands: Sequence[Operand]) -> Origin | None:
    """Return the origin of a result outside of a body: indices that were computed within are unknown there."""
    known = [pin.index for operand in operands if operand.origin for pin in operand.origin.pins]
    is_known = origin and all(isinstance(pin.index, int) or any(pin.index is i for i in known) for pin in origin.pins)
    return origin if is_known else None


def _summary(operand: Operand) -> tuple[bool, frozenset[Hashable], frozenset[str]]:
    """Return what may change of an operand while a loop is analysed."""
    return operand.origin is None, operand.varies, operand.lost


def _slice_of(operand: Operand, value: Any, index: Any) -> Operand:
    """Return one layer of a stack that a scan goes through."""
    origin = operand.origin and operand.origin.pin(0, index)
    lost = operand.lost | {operand.origin.path} if operand.origin and not origin else operand.lost
    return Operand(value, origin, operand.varies, lost)
