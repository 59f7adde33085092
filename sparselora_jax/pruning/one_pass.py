"""Run samples through a program and prune its kernels on the way, so that each product runs once.

The program is cut at its kernels (`tracing.schedule`). All chunks of samples run up to a cut, the statistics of its
kernels are then complete, the kernels are pruned, and the chunks go on through them. Kernels that read the same array
(q, k and v) share a cut. GPTQ calls this order true sequential.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.calibrate import CalibrationError, InputStatistic
from sparselora_jax.pruning.method import Method, MethodError
from sparselora_jax.pruning.offload import to_device, to_host
from sparselora_jax.pruning.tracing.origin import Origin
from sparselora_jax.pruning.tracing.schedule import (
    Cut,
    Loop,
    Schedule,
    Segment,
    Step,
    Unit,
    free_variables,
    function_of,
    identity,
)
from sparselora_jax.sparse import sharding

# The values of a program: those that all chunks share, or those of one chunk.
Values = dict[core.Var, Any]


class Place(NamedTuple):
    """Where a kernel of a program, or of the body of a loop, lies in a leaf.

    Attributes:
      path: path of the leaf.
      index: {axis of the leaf: index} of the axes that the kernel is one index of.
      axes: for each axis of the kernel the axes of the leaf that it consists of.
      layouts: origins that lead back to the leaf, from the inside out.
    """

    path: str
    index: dict[int, int]
    axes: tuple[tuple[int, ...], ...]
    layouts: tuple[Origin, ...] = ()

    @classmethod
    def of_leaf(cls, path: str, shape: Sequence[int]) -> 'Place':
        """Return the place of a whole leaf.

        Args:
          path: path of the leaf.
          shape: its shape.
        """
        return cls(path, {}, tuple((axis,) for axis in range(len(shape))))

    def of_part(self, origin: Origin) -> 'Place':
        """Return the place of a value within the kernel.

        Args:
          origin: origin of the value, whose leaf is the kernel.
        """
        index = dict(self.index)
        for pin in origin.pins:
            index.update(dict.fromkeys(self.axes[pin.axis], int(pin.index)))
        # A transposed stack has its axes in another order than the leaf.
        axes = tuple(tuple(axis for part in parts for axis in self.axes[part.axis]) for parts in origin.axes)
        return Place(self.path, index, axes, (origin, *self.layouts))

    def to_leaf(self, array: Array) -> Array:
        """Return an array of the kernel's layout in that of the leaf, without the axes of `index`.

        Args:
          array: the kernel, or its mask.
        """
        # A layer of a layer was cut out in two steps, which are undone one after the other.
        for origin in self.layouts:
            array = origin.to_leaf(array)
        return jnp.squeeze(array, tuple(self.index))

    def __str__(self) -> str:
        return self.name_of(None)

    def name_of(self, layer: int | None) -> str:
        """Return the name of the kernel for messages.

        Args:
          layer: number of the layer within the kernel; None: all of it.
        """
        numbers = [self.index[axis] for axis in sorted(self.index)] + ([] if layer is None else [layer])
        return f'{self.path}, layer {", ".join(map(str, numbers))}' if numbers else self.path


class Level(NamedTuple):
    """A program at one shape of the chunks.

    Attributes:
      schedule: its schedule.
      shared: values that all chunks of this shape share; pruned kernels are added to them.
    """

    schedule: Schedule
    shared: Values

    @classmethod
    def of_arguments(cls, schedule: Schedule, params: Sequence[Any]) -> 'Level':
        """Return a program with its params.

        Args:
          schedule: the schedule of the program.
          params: its first arguments.
        """
        shared = _constants(schedule.program)
        # The batch comes after the params.
        return cls(schedule, shared | dict(zip(schedule.program.jaxpr.invars, params, strict=False)))

    def values_of_chunk(self, batch: Sequence[Any]) -> Values:
        """Return a chunk's arguments of the program.

        Args:
          batch: arrays of the batch: the last arguments.
        """
        arguments = self.schedule.program.jaxpr.invars
        return dict(zip(arguments[len(arguments) - len(batch) :], batch, strict=True))

    def value(self, atom: Any, jitted: Callable[[core.ClosedJaxpr], Callable[..., Any]]) -> Any:
        """Return a value that all chunks share, and compute it if it is not known yet.

        Args:
          atom: the value.
          jitted: compiles a program.
        """
        if isinstance(atom, core.Literal):
            return atom.val
        if atom in self.shared:
            return self.shared[atom]
        equations = self.schedule.needed([atom], self.shared)
        inputs = free_variables(equations)
        program = function_of(equations, inputs, [atom], self.schedule.program)
        return jitted(program)(*[self.shared[variable] for variable in inputs])[0]


@dataclass
class Chunk:
    """A chunk of samples on its way through a program.

    Attributes:
      level: number of the level whose shape it has.
      values: its values that are still needed. On a mesh each has an axis of devices in front.
      weights: path of a kernel -> the weights of the tokens; None: all rows of its input count once.
    """

    level: int
    values: Values
    weights: Callable[[str], Array | None] = lambda path: None

    def keep(self, live: Collection[core.Var]) -> None:
        """Let go of the values that are not needed any more.

        Args:
          live: the others.
        """
        self.values = {variable: value for variable, value in self.values.items() if variable in live}


class Target(NamedTuple):
    """A kernel to prune.

    Attributes:
      path: path of the leaf that it is, or that it is a layer of.
      place: where it lies.
      kernel: its weights, in the layout in which the program holds them.
      statistic: the statistic of its input.
    """

    path: str
    place: Place
    kernel: Array
    statistic: InputStatistic


# Prunes the kernels of one cut, and returns them by name, in the layout of `Target.kernel`.
Prune = Callable[[dict[str, Target]], dict[str, Array]]


@dataclass
class OnePass:
    """Runs chunks of samples through programs whose kernels it prunes.

    Attributes:
      method_of: path of a kernel -> its method.
      mesh: mesh over which samples are split; None: one device.
      offload: whether the values of a chunk wait on the host while other chunks run.
      prune: prunes the kernels of one cut; may change between two runs.
    """

    method_of: Callable[[str], Method]
    mesh: Mesh | None = None
    offload: bool = False
    prune: Prune | None = None
    _compiled: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    _of_segment: dict[int, tuple[Segment, Callable[..., Any]]] = field(default_factory=dict)
    _observers: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    _of_cut: dict[int, tuple[Cut, Callable[..., Any]]] = field(default_factory=dict)

    def run(self, levels: Sequence[Level], chunks: Sequence[Chunk], places: Mapping[str, Place]) -> None:
        """Run all chunks through a program, and prune its kernels on the way.

        Args:
          levels: the program, at each shape of the chunks.
          chunks: the chunks; their values are replaced by those that are needed after the program.
          places: place of each kernel argument, by the path that it has in the program.

        Raises:
          CalibrationError, MethodError: from statistics or `prune`; names the kernel.
        """
        schedules = [level.schedule for level in levels]
        # A forward may look at sizes: what it does with a small batch need not be what it does with a large one.
        if len({tuple(map(_kernels_of_step, schedule.steps)) for schedule in schedules}) > 1:
            raise CalibrationError(
                'the forward is another program for batches of another size: use batches of one size'
            )
        for number, steps in enumerate(zip(*[schedule.steps for schedule in schedules], strict=True)):
            # Chunks run one after the other; at a cut all of them have arrived.
            if isinstance(steps[0], Segment):
                for chunk in chunks:
                    self._run_segment(levels[chunk.level], steps[chunk.level], chunk)
                    # Its inputs are let go before the next chunk runs.
                    chunk.keep(schedules[chunk.level].live[number])
                continue
            if isinstance(steps[0], Cut):
                self._prune(levels, steps, chunks, places)
            else:
                self._run_loop(levels, steps, chunks, places)
            for chunk in chunks:
                chunk.keep(schedules[chunk.level].live[number])

    def _run_segment(self, level: Level, segment: Segment, chunk: Chunk) -> None:
        # Nothing reads what comes after the last kernel.
        if not segment.outputs:
            return
        # The same segment runs for every chunk, and for every layer of a loop. Its program is built once.
        if id(segment) not in self._of_segment:
            self._of_segment[id(segment)] = segment, self._on_own_rows(level.schedule, segment)
        _, run = self._of_segment[id(segment)]
        own = self.on_device([chunk.values[var] for var in segment.inputs if var in level.schedule.varying])
        shared = [level.shared[variable] for variable in segment.inputs if variable not in level.schedule.varying]
        results = self.kept(run(shared, own))
        chunk.values.update(zip(segment.outputs, results, strict=True))

    def on_device(self, values: PyTree) -> PyTree:
        """Return values of a chunk where programs can read them.

        Args:
          values: values as a chunk holds them.
        """
        return to_device(values) if self.offload else values

    def kept(self, values: PyTree) -> PyTree:
        """Return values of a chunk where they are to wait.

        Args:
          values: values as a program returned them.
        """
        return to_host(values) if self.offload else values

    def _on_own_rows(self, schedule: Schedule, segment: Segment) -> Callable[..., Any]:
        """Return `(shared values, values of a chunk) -> results`, compiled; segments of equal structure share one."""
        program = function_of(segment.equations, segment.inputs, segment.outputs, schedule.program)
        is_shared = tuple(variable not in schedule.varying for variable in segment.inputs)
        key = is_shared, identity(program)
        if key not in self._compiled:

            def run_segment(of_all, of_chunk):
                of_all = iter(of_all)
                of_chunk = iter(self._of_device(of_chunk))
                arguments = [next(of_all) if shared else next(of_chunk) for shared in is_shared]
                return self._of_all_devices(core.jaxpr_as_fun(program)(*arguments))

            self._compiled[key] = jax.jit(sharding.on_own_rows(run_segment, self.mesh))
        return self._compiled[key]

    def _of_device(self, values: PyTree) -> PyTree:
        """Return a chunk's values without the axis of devices, of which each device sees its own entry."""
        return values if self.mesh is None else jax.tree.map(lambda leaf: leaf[0], values)

    def _of_all_devices(self, values: PyTree) -> PyTree:
        return values if self.mesh is None else jax.tree.map(lambda leaf: leaf[None], values)

    def _jitted(self, program: core.ClosedJaxpr) -> Callable[..., Any]:
        """Return a compiled program of shared values."""
        key = identity(program)
        if key not in self._compiled:
            self._compiled[key] = jax.jit(core.jaxpr_as_fun(program))
        return self._compiled[key]

    def _prune(
        self, levels: Sequence[Level], cuts: Sequence[Cut], chunks: Sequence[Chunk], places: Mapping[str, Place]
    ) -> None:
        """Prune the kernels of a cut."""
        # Short names, so that cuts of equal structure have equal programs.
        names = {unit: f'kernel{number}' for number, unit in enumerate(sorted(cuts[0].kernels))}
        # All levels have the same kernels, so the first one stands for them.
        place_of = {name: places[unit.path].of_part(cuts[0].origins[unit]) for unit, name in names.items()}
        kernels = {
            name: jnp.asarray(levels[0].value(cuts[0].kernels[unit], self._jitted)) for unit, name in names.items()
        }
        batches = _OneByOne(
            [
                functools.partial(self._batch, levels[chunk.level], cuts[chunk.level], chunk, place_of)
                for chunk in chunks
            ]
        )
        # Statistics know the short names, and their errors should not.
        with _naming(place_of):
            # As of a segment, the programs of a cut are built once for all layers of a loop.
            if id(cuts[0]) not in self._of_cut:
                self._of_cut[id(cuts[0])] = cuts[0], self._observer(levels, cuts, names, place_of)
            _, observe = self._of_cut[id(cuts[0])]
            statistics = observe(kernels, batches, lambda name, layer: place_of[name].name_of(layer))
        targets = {
            str(place): Target(place.path, place, kernels[name], statistics[name]) for name, place in place_of.items()
        }
        pruned = self.prune(targets)
        # From here on, what reads a kernel reads the pruned one.
        for level, cut in zip(levels, cuts, strict=True):
            for unit, name in names.items():
                kernel = pruned[str(place_of[name])]
                level.shared[cut.kernels[unit]] = kernel
                for copy, origin in cut.copies[unit].items():
                    level.shared[copy] = origin.from_leaf(cuts[0].origins[unit].to_leaf(kernel))

    def _batch(
        self, level: Level, cut: Cut, chunk: Chunk, place_of: Mapping[str, Place]
    ) -> tuple[dict[int, list[Any]], dict[str, Array]]:
        """Return what the products of a cut read, by the number of its level, and the weights of the tokens."""
        inputs = [
            self.on_device(chunk.values[variable])
            if variable in chunk.values
            else self._for_each_device(level.value(variable, self._jitted))
            for variable in cut.inputs
        ]
        weights = self.on_device({name: chunk.weights(place.path) for name, place in place_of.items()})
        return {chunk.level: inputs}, {name: of_kernel for name, of_kernel in weights.items() if of_kernel is not None}

    def _for_each_device(self, value: Any) -> Any:
        """Return a value with an axis of devices, each of which gets the same."""
        # Without a mesh values have no such axis.
        if self.mesh is None:
            return value
        return jnp.broadcast_to(value, (sharding.row_parts(self.mesh), *np.shape(value)))

    def _observer(
        self, levels: Sequence[Level], cuts: Sequence[Cut], names: Mapping[Unit, str], place_of: Mapping[str, Place]
    ) -> Callable[..., dict[str, InputStatistic]]:
        """Return `(kernels, batches, place) -> statistics` of the products of a cut."""
        stats = {
            # A method without a statistic gets squares, to count tokens and to find activations that are not finite.
            name: self.method_of(place.path).statistic or calibrate.squares
            for name, place in place_of.items()
        }
        layouts = {name: cuts[0].origins[unit].layout for unit, name in names.items()}
        programs = []
        for level, cut in zip(levels, cuts, strict=True):
            held = [(variable, names[unit], cut.origins[unit].layout) for unit, variable in cut.kernels.items()]
            held += [
                (copy, names[unit], origin.layout)
                for unit, copies in cut.copies.items()
                for copy, origin in copies.items()
            ]
            results = [variable for equation in cut.equations for variable in equation.outvars]
            arguments = [*[variable for variable, _, _ in held], *cut.inputs]
            program = function_of(cut.equations, arguments, results, level.schedule.program)
            programs.append((program, [(name, layout) for _, name, layout in held]))
        programs_as_keys = tuple((identity(program), str(held)) for program, held in programs)
        key = programs_as_keys, tuple(stats.items())
        if key not in self._observers:
            # The products need not run: only their inputs are observed, and the compiler drops the rest.
            def forward(kernels, batch):
                # Two levels may read arrays of equal shapes here, and differ in the rounds of a loop.
                ((number, inputs),) = self._of_device(batch)[0].items()
                program, held = programs[number]
                # Equal layouts need no operations.
                of_cut = [
                    kernels[name] if layout == layouts[name] else layout.from_leaf(layouts[name].to_leaf(kernels[name]))
                    for name, layout in held
                ]
                return core.jaxpr_as_fun(program)(*of_cut, *inputs)

            def token_weights(name, batch):
                return self._of_device(batch)[1].get(name)

            self._observers[key] = calibrate.make_observer(
                forward,
                stats=stats.get,
                token_weights=token_weights,
                mesh=self.mesh,
                name_of_batch='chunk',
                may_fit_none=True,  # weights are those of the whole forward, of which this is a part
            )
        return self._observers[key]

    def _run_loop(
        self, levels: Sequence[Level], loops: Sequence[Loop], chunks: Sequence[Chunk], places: Mapping[str, Place]
    ) -> None:
        """Run a scan layer by layer."""
        params = loops[0].equation.params
        num_consts = params['num_consts']
        num_outer = num_consts + params['num_carry']
        # As the scan itself would, from the last layer to the first if it says so.
        layers = range(params['length'])
        if params['reverse']:
            layers = reversed(layers)
        of_all = [self._shared_arguments(level, loop.equation) for level, loop in zip(levels, loops, strict=True)]
        carries = []
        for chunk in chunks:
            own = _own_arguments(loops[chunk.level].equation, chunk)
            carries.append(
                [
                    own[i] if i in own else self._for_each_device(of_all[chunk.level][i])
                    for i in range(num_consts, num_outer)
                ]
            )
        # For each chunk, what each layer adds to the stacked outputs.
        stacks: list[list[list[Any]]] = [[] for _ in chunks]
        for layer in layers:
            # The programs of a layer are those of every layer; only the values differ.
            inner_levels = [
                Level(loop.body, _constants(loop.body.program) | _of_layer(loop, values, num_consts, num_outer, layer))
                for loop, values in zip(loops, of_all, strict=True)
            ]
            inner_chunks = []
            for chunk, carry in zip(chunks, carries, strict=True):
                loop = loops[chunk.level]
                axis = 0 if self.mesh is None else 1  # behind the axis of devices
                own = self.on_device(_own_arguments(loop.equation, chunk))
                values = self.kept(_of_layer(loop, own, num_consts, num_outer, layer, axis))
                values.update(zip(loop.body.program.jaxpr.invars[num_consts:num_outer], carry, strict=True))
                inner_chunks.append(Chunk(chunk.level, values, chunk.weights))
            inner_places = {
                name: places[origin.path].of_part(origin.pin(0, layer)) for name, origin in loops[0].kernels.items()
            }
            self.run(inner_levels, inner_chunks, inner_places)
            # An output of the body may be one of its constants or weights, which chunks share.
            for index, chunk in enumerate(inner_chunks):
                level = inner_levels[chunk.level]
                results = [
                    chunk.values[atom]
                    if not isinstance(atom, core.Literal) and atom in chunk.values
                    else self._for_each_device(level.value(atom, self._jitted))
                    for atom in level.schedule.program.jaxpr.outvars
                ]
                carries[index] = results[: params['num_carry']]
                stacks[index].append(results[params['num_carry'] :])
        for chunk, carry, stack in zip(chunks, carries, stacks, strict=True):
            ordered = stack[::-1] if params['reverse'] else stack
            axis = 0 if self.mesh is None else 1
            of_layers = [jnp.stack(self.on_device(outputs), axis) for outputs in zip(*ordered, strict=True)]
            results = [*carry, *self.kept(of_layers)]
            chunk.values.update(zip(loops[chunk.level].equation.outvars, results, strict=True))

    def _shared_arguments(self, level: Level, equation: core.JaxprEqn) -> dict[int, Any]:
        """Return the arguments of a loop that all chunks share, by number."""
        varying = level.schedule.varying
        return {
            index: level.value(atom, self._jitted)
            for index, atom in enumerate(equation.invars)
            if isinstance(atom, core.Literal) or atom not in varying
        }


def _kernels_of_step(step: Step) -> tuple:
    """Return what steps of two programs must share to be one step: its kind and, in order, what it prunes."""
    if isinstance(step, Segment):
        return (Segment,)
    if isinstance(step, Cut):
        return (Cut, *sorted(step.kernels))
    # The rounds of a loop go through these, and the body of each is compared when it runs.
    params = step.equation.params
    rounds = [params[name] for name in ('length', 'reverse', 'num_consts', 'num_carry')]
    return (Loop, *rounds, *[(origin.path, origin.axes, origin.pins) for origin in step.kernels.values()])


class _OneByOne(Sequence):
    """A sequence whose items are made when they are read, so that no two of them need memory at once."""

    def __init__(self, makers: Sequence[Callable[[], Any]]):
        self._makers = makers

    def __len__(self) -> int:
        return len(self._makers)

    def __getitem__(self, index: int) -> Any:
        return self._makers[index]()


def _own_arguments(equation: core.JaxprEqn, chunk: Chunk) -> dict[int, Any]:
    """Return the arguments of a loop that are a chunk's own, by number."""
    return {
        index: chunk.values[atom]
        for index, atom in enumerate(equation.invars)
        if not isinstance(atom, core.Literal) and atom in chunk.values
    }


def _constants(program: core.ClosedJaxpr) -> Values:
    return dict(zip(program.jaxpr.constvars, program.consts, strict=True))


def _of_layer(
    loop: Loop, arguments: Mapping[int, Any], num_consts: int, num_outer: int, layer: int, axis: int = 0
) -> Values:
    """Return the arguments of a loop's body for one layer, apart from the carry.

    Args:
      loop: the loop.
      arguments: arguments of the loop, by number.
      num_consts: number of arguments that are the same for all layers.
      num_outer: number of arguments before the stacks of all layers.
      layer: number of the layer.
      axis: axis of the layers in a stack.
    """
    values = {}
    for index, value in arguments.items():
        variable = loop.body.program.jaxpr.invars[index]
        if index < num_consts:
            values[variable] = value
        elif index >= num_outer:
            # Layers of weights on disk are read here.
            values[variable] = jnp.asarray(value[layer] if axis == 0 else value[:, layer])
    return values


@contextmanager
def _naming(place_of: Mapping[str, Place]) -> Iterator[None]:
    """Replace the name of a kernel at the start of an error by its place."""
    try:
        yield
    except (CalibrationError, MethodError) as error:
        place, colon, message = str(error).partition(':')
        name, _, layer = place.partition(', layer ')
        # Not every message begins with a kernel.
        if name not in place_of:
            raise
        raise type(error)(f'{place_of[name].name_of(int(layer) if layer else None)}{colon}{message}') from None
