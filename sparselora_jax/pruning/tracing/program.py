"""Run a traced program equation by equation, and visit each product that reads a leaf of params."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import PyTree

from sparselora_jax.pruning.tracing.operations import Operand, UnfollowedError, origins_after
from sparselora_jax.pruning.tracing.origin import Origin
from sparselora_jax.pruning.tracing.products import PRODUCTS, Product, find_product
from sparselora_jax.sparse.axes import KernelAxes
from sparselora_jax.sparse.rules import leaves_by_path

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

NEVER_READ = (
    'the forward never multiplies with it, as part of its first argument; params from outside the function do not count'
)


class Program(NamedTuple):
    """A traced forward.

    Attributes:
      jaxpr: the program; its arguments are the arrays of params, then those of the batch.
      origins: the origin of each argument; None: it is no kernel, or belongs to the batch.
      num_params: number of arguments that belong to params.
      axes: {path: the roles of its axes} of all kernels that a product reads, in the order in which the program does.
      lost: {path: why}, of the other kernels.
    """

    jaxpr: core.ClosedJaxpr
    origins: list[Origin | None]
    num_params: int
    axes: dict[str, KernelAxes]
    lost: dict[str, str]

    def run(self, params: PyTree, batch: PyTree, visit: Callable[[Product], None]) -> None:
        """Run the program, and call `visit` with each product of a kernel; it is called under jit.

        Args:
          params: see `trace`.
          batch: see `trace`.
          visit: called with each product of a kernel that `axes` holds.
        """
        walk = Walk(lambda product: visit(product) if product.path in self.axes else None, has_values=True)
        walk.run(self.jaxpr, self._arguments(arrays_of((params, batch))))

    def _arguments(self, values: Sequence[Any]) -> list[Operand]:
        return [
            Operand(value, origin, index >= self.num_params)
            for index, (value, origin) in enumerate(zip(values, self.origins, strict=True))
        ]


def trace(
    forward: Callable[[Any, Any], Any], params: PyTree, batch: PyTree, is_kernel: Callable[[str], bool]
) -> Program:
    """Trace a forward, and find the products that read its kernels.

    Args:
      forward: `forward(params, batch)`; its result is discarded.
      params: any tree. Leaves that are no arrays are given to `forward` as they are.
      batch: any tree of arrays.
      is_kernel: path of an array of params -> whether to follow it.
    """
    leaves, structure = jax.tree.flatten((params, batch))

    def run(arrays):
        remaining = iter(arrays)
        whole = structure.unflatten([next(remaining) if is_array(leaf) else leaf for leaf in leaves])
        # The program needs results to be a program; what is no array cannot be one of them.
        return [result for result in jax.tree.leaves(forward(*whole)) if is_array(result)]

    # Shapes are enough: within `jit`, the arrays are tracers of the outer program.
    jaxpr = jax.make_jaxpr(run)(arrays_of((params, batch)))
    origins = [
        Origin.of_leaf(path, leaf.shape) if is_kernel(path) else None
        for path, leaf in leaves_by_path(params).items()
        if is_array(leaf)
    ]
    num_params = len(origins)
    origins += [None] * len(arrays_of(batch))
    program = Program(jaxpr, origins, num_params, {}, {})
    return program._replace(**_analysis(program))


def is_array(leaf: object) -> bool:
    """Return whether a leaf is an array, or the shape of one."""
    return hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')


def arrays_of(tree: PyTree) -> list[Any]:
    """Return the leaves of a tree that are arrays, in order: the arguments of a traced program.

    Args:
      tree: params, or a batch.
    """
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def _analysis(program: Program) -> dict[str, dict]:
    """Return what is known of the kernels of a program: the fields `axes` and `lost`."""
    products: dict[str, list[Product]] = {}
    walk = Walk(lambda product: products.setdefault(product.path, []).append(product), has_values=False)
    walk.run(program.jaxpr, program._arguments([None] * len(program.origins)))
    kernels = [origin.path for origin in program.origins if origin is not None]
    lost = {path: walk.lost.get(path, NEVER_READ) for path in kernels if path not in products}
    axes = {}
    for path, of_kernel in products.items():
        # One statistic cannot serve a matrix and its transpose.
        if len({product.axes for product in of_kernel}) > 1:
            lost[path] = 'products contract different axes of it'
        else:
            axes[path] = of_kernel[0].axes
    return {'axes': axes, 'lost': lost}


class Walk:
    """One pass over a program: with values, or without to analyse it.

    Attributes:
      lost: {path: what lost the leaf}, of all leaves that reached an operation that cannot be followed.
    """

    def __init__(self, visit: Callable[[Product], None], *, has_values: bool):
        """Create a walk.

        Args:
          visit: called with each product of a leaf.
          has_values: whether operands have values, and operations are to be run.
        """
        self.visit = visit
        self.has_values = has_values
        self.lost: dict[str, str] = {}
        self._callers: list[core.JaxprEqn] = []
        self._scope: object = None

    def run(self, program: core.ClosedJaxpr, operands: Sequence[Operand]) -> list[Operand]:
        """Run a program and return its results.

        Args:
          program: the program.
          operands: its arguments.
        """
        self._debug_info = program.jaxpr.debug_info
        constants = [Operand(constant, None, False) for constant in program.consts]
        variables = dict(zip(program.jaxpr.constvars, constants, strict=True))
        variables.update(zip(program.jaxpr.invars, operands, strict=True))

        def read(atom):
            return Operand(atom.val, None, False) if isinstance(atom, core.Literal) else variables[atom]

        for equation in program.jaxpr.eqns:
            results = self._run_equation(equation, [read(atom) for atom in equation.invars])
            variables.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in program.jaxpr.outvars]

    def _run_equation(self, equation: core.JaxprEqn, operands: list[Operand]) -> list[Operand]:
        origins: list[Origin | None] = [None] * len(equation.outvars)
        followed = [operand.origin for operand in operands if operand.origin is not None]
        name = equation.primitive.name
        if followed and name in CALLS:
            self._callers.append(equation)
            results = self.run(closed(equation.params[CALLS[name]]), operands)
            self._callers.pop()
            return results
        if followed and name in _CONTROL_FLOW:
            return _CONTROL_FLOW[name](self, equation, operands)
        if followed:
            try:
                if name in PRODUCTS:
                    self.visit(replace(find_product(equation, operands), scope=self._scope))
                else:
                    origins = origins_after(equation, operands)
            except UnfollowedError as reason:
                for origin in followed:
                    self.lost.setdefault(origin.path, f'{name} ({self._line_of(equation)}): {reason}')
        values = self._bind(equation, operands)
        varies = any(operand.varies for operand in operands)
        return [Operand(value, origin, varies) for value, origin in zip(values, origins, strict=True)]

    def _run_body(self, body: core.ClosedJaxpr, operands: Sequence[Operand]) -> list[Operand]:
        """Run the body of a loop, or a branch: its products are not always run together with those around it."""
        outer = self._scope
        self._scope = object()
        results = self.run(body, operands)
        self._scope = outer
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

    def _analyse(self, program: core.ClosedJaxpr, operands: Sequence[Operand]) -> list[Operand]:
        """Return the results of a program without values: their origins and what varies."""
        analysis = Walk(lambda product: None, has_values=False)
        return analysis.run(program, _without_values(operands))

    def _invariant(
        self, program: core.ClosedJaxpr, before: Sequence[Operand], carry: Sequence[Operand], after: Sequence[Operand]
    ) -> list[Operand]:
        """Return what is known of a loop's carry in every round, without values.

        Weights may pass through a loop unchanged, in its carry. What changes from round to round loses its origin.

        Args:
          program: the body of the loop; its first results are the next carry.
          before: arguments before the carry.
          carry: the first carry.
          after: arguments after the carry.
        """
        known = [Operand(None, operand.origin, operand.varies) for operand in carry]
        # Each round can only lose origins, so this ends.
        while True:
            results = self._analyse(program, [*before, *known, *after])[: len(known)]
            weaker = [
                Operand(None, _common_origin([old, new]), old.varies or new.varies)
                for old, new in zip(known, results, strict=True)
            ]
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
        known = self._invariant(body, consts, carry, slices)
        if not self.has_values:
            results = self.run(body, [*consts, *known, *slices])
            return [*known, *[Operand(None, None, result.varies) for result in results[num_carry:]]]
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
        known = self._invariant(body, body_consts, carry, [])
        if not self.has_values:
            self.run(body, [*body_consts, *known])
            return known

        def run_condition(values):
            # Its products decide only when to stop, so nothing is followed there.
            constants = [operand.value for operand in cond_consts]
            (goes_on,) = core.jaxpr_as_fun(params['cond_jaxpr'])(*constants, *values)
            return goes_on

        def run_round(values):
            inner = [operand._replace(value=value) for operand, value in zip(known, values, strict=True)]
            return [operand.value for operand in self._run_body(body, [*body_consts, *inner])]

        values = jax.lax.while_loop(run_condition, run_round, [operand.value for operand in carry])
        return [operand._replace(value=value) for operand, value in zip(known, values, strict=True)]

    def _cond(self, equation: core.JaxprEqn, operands: list[Operand]) -> list[Operand]:
        index, *arguments = operands
        branches = equation.params['branches']
        of_branches = [self._analyse(branch, arguments) for branch in branches]
        # A result has an origin only if all branches agree.
        known = [
            Operand(None, _common_origin(results), index.varies or any(result.varies for result in results))
            for results in zip(*of_branches, strict=True)
        ]
        if not self.has_values:
            for branch in branches:
                self.run(branch, arguments)
            return known

        # Operands are captured and not passed, so that they keep their origins.
        def runner(branch):
            return lambda: [operand.value for operand in self._run_body(branch, arguments)]

        values = jax.lax.switch(index.value, [runner(branch) for branch in branches])
        return [operand._replace(value=value) for operand, value in zip(known, values, strict=True)]


_CONTROL_FLOW = {'scan': Walk._scan, 'while': Walk._while, 'cond': Walk._cond}


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


def _summary(operand: Operand) -> tuple[bool, bool]:
    """Return what may change of an operand while a loop is analysed."""
    return operand.origin is None, operand.varies


def _slice_of(operand: Operand, value: Any, index: Any) -> Operand:
    """Return one layer of a stack that a scan goes through."""
    origin = operand.origin and operand.origin.pin(0, index)
    return Operand(value, origin, operand.varies)
