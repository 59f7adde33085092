"""Read from a compiled program's text what it sends between devices: kinds, bytes and counts, loops included.

XLA offers no such count: its cost analysis counts the body of a loop once. The operations of a compiled program are
only available as text, `compiled.as_text()` (HLO). That text is a list of computations:

    %body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
      %r = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%sum
      ROOT %t = (s32[], f32[8]{0}) tuple(%next, %r)
    }

    ENTRY %main (p: f32[8]) -> f32[8] {
      %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body
    }

A computation begins with its head and ends with a brace. A line holds one operation: its name, the shape of its result,
the operation, its operands, and attributes, which name the computations that it calls. The walk starts at ENTRY; each
computation that a loop calls counts as often as the loop runs.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')

# A computation's head, up to its brace; group 1 is its name. Some compilers leave out the
# percent sign or the parameters.
_HEAD = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) (?:\([^\n]*)?-> [^\n]*{$', re.M)
# A line: (shape of the result, operation, operands and attributes).
_OPERATION = re.compile(r'^ *(?:ROOT )?%?[\w.\-]+ = (.+?) ([a-z][a-z\d\-]*)\((.*)$', re.M)
# An array within a shape: (bits of a number, dimensions), e.g. bf16[4,8]. pred has no bits: a number takes a byte.
_ARRAY = re.compile(r'\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')
# An attribute that calls computations: (a list in braces, or one name).
_CALLED = re.compile(r'(?:to_apply|calls|body|called_computations|branch_computations)=(?:{([^}]*)}|%?([\w.\-]+))')


class Collective(NamedTuple):
    """One operation of a program that sends data between devices.

    Attributes:
      kind: one of `KINDS`.
      size: bytes of its result on one device.
      group: number of devices that take part together.
      times: how often it runs in one run of the program.
    """

    kind: str
    size: int
    group: int
    times: int

    @property
    def sent(self) -> float:
        """Return the bytes that a device sends in all runs of the operation, by the ring algorithms that send least."""
        others = self.group - 1
        each = {
            'all-gather': self.size * others / self.group,
            # A reduce-scatter, then an all-gather.
            'all-reduce': 2 * self.size * others / self.group,
            # The result is one part; a device sends the parts of all other devices.
            'reduce-scatter': self.size * others,
            'all-to-all': self.size * others / self.group,
        }
        return float(self.times * each.get(self.kind, self.size if others else 0))


def collectives(text: str, devices: int) -> list[Collective]:
    """Return the collectives of a compiled program.

    Args:
      text: `compiled.as_text()`.
      devices: number of devices that run the program; a collective without groups involves all of them.

    Raises:
      ValueError: a collective is in a loop whose number of rounds the compiler does not know.
    """
    heads = list(_HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    computations = {head[1]: text[head.end() : end] for head, end in zip(heads, ends, strict=True)}
    entry = next(head[1] for head in heads if head[0].startswith('ENTRY'))
    return list(_walk(computations, entry, 1, devices, set()))


def _walk(computations: Mapping[str, str], name: str, times: int, devices: int, seen: set[str]) -> Iterator[Collective]:
    """Yield the collectives of a computation and of those that it calls.

    Args:
      computations: text of each computation, by name.
      name: name of the computation.
      times: how often the computation runs.
      devices: see `collectives`.
      seen: channels already counted in this round of the innermost loop. The TPU compiler repeats a collective in each
        of the fusions that start it, overlap it with computation and end it; all have the same channel.
    """
    for result, operation, rest in _OPERATION.findall(computations[name]):
        # An asynchronous collective has two operations, start and done; the first is counted.
        kind = operation.removesuffix('-start')
        if kind in KINDS:
            channel = re.search(r'channel_id=(\d+)', rest)
            if channel and channel[1] in seen:
                continue
            if channel:
                seen.add(channel[1])
            yield Collective(kind, _size(result, started=operation != kind), _group(rest, devices), times)
            # It calls only its reduction (sum or maximum), which sends nothing.
            continue
        for called in _called(rest):
            if operation != 'while':
                yield from _walk(computations, called, times, devices, seen)
                continue
            inside = list(_walk(computations, called, times, devices, set()))
            rounds = _rounds(computations, rest) if inside else None
            if inside and rounds is None:
                raise ValueError(f'{inside[0].kind} in a loop ({called}) whose number of rounds is not known')
            for collective in inside:
                yield collective._replace(times=collective.times * rounds)


def _called(rest: str) -> Iterator[str]:
    """Yield the names of the computations that an operation's attributes call."""
    for listed, single in _CALLED.findall(rest):
        yield from re.findall(r'[\w.\-]+', listed) if listed else [single]


def _rounds(computations: Mapping[str, str], rest: str) -> int | None:
    """Return how often a loop runs, or None if that is not known.

    Some compilers write the number into the text. For others (TPUs) it is read from the loop itself: its counter starts
    at 0, `condition` compares it with a constant, and `body` adds a constant.

    Args:
      computations: text of each computation, by name.
      rest: operands and attributes of the loop.
    """
    known = re.search(r'"known_trip_count":{"n":"(\d+)"}', rest)
    if known:
        return int(known[1])
    condition, body = (computations[re.search(rf'{name}=%?([\w.\-]+)', rest)[1]] for name in ('condition', 'body'))
    # ROOT %lt = pred[] compare(%i, %limit), direction=LT
    compared = re.search(r'ROOT [^\n]* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT', condition)
    if not compared:
        return None
    limit = _constant(condition, compared[2])
    # %i = s32[] get-tuple-element(%p), index=0: the index of the counter in the loop's carry
    place = re.search(rf'%?{re.escape(compared[1])} = [^\n]*get-tuple-element\([^\n]*index=(\d+)', condition)
    # ROOT %t = (s32[], ...) tuple(%next, /*index=1*/%z): the new carry, with the counter at the same index
    carried = re.search(r'ROOT [^\n]* tuple\(([^\n)]*)\)', body)
    if limit is None or not place or not carried:
        return None
    names = re.sub(r'/\*index=\d+\*/', '', carried[1]).split(', ')
    counter = names[int(place[1])].removeprefix('%')
    # %next = s32[] add(%i, %step)
    added = re.search(rf'%?{re.escape(counter)} = \S+ add\(%?[\w.\-]+, %?([\w.\-]+)\)', body)
    step = _constant(body, added[1]) if added else None
    return -(-limit // step) if step else None  # rounded up


def _constant(computation: str, name: str) -> int | None:
    """Return the value of an integer constant, or None if the name is not such a constant."""
    constant = re.search(rf'%?{re.escape(name)} = [su]32\[\]\S* constant\((\d+)\)', computation)
    return int(constant[1]) if constant else None


def _size(result: str, *, started: bool) -> int:
    """Return the bytes of an operation's result.

    Args:
      result: its shape, e.g. `(f32[8]{0}, f32[2]{0})`.
      started: whether the operation starts an asynchronous collective; its shape then lists the operands first.
    """
    sizes = []
    for bits, shape in _ARRAY.findall(result):
        numbers = math.prod(int(axis) for axis in shape.split(',') if axis)
        sizes.append(numbers * int(bits or 8) // 8)
    if started and result.startswith('(('):
        # ((operands), (results), ...)
        sizes = sizes[len(sizes) // 2 :]
    elif started and result.startswith('('):
        # (operand, result, ...); the rest is only a few bytes.
        sizes = sizes[1:2]
    return sum(sizes)


def _group(rest: str, devices: int) -> int:
    """Return how many devices take part in a collective together, which HLO writes in one of four ways."""
    # replica_groups=[2,4]<=[8]: two groups of four
    if groups := re.search(r'replica_groups=\[(\d+),(\d+)\]', rest):
        return int(groups[2])
    # replica_groups={{0,1},{2,3}}
    if groups := re.search(r'replica_groups={{([\d,]+)}', rest):
        return len(groups[1].split(','))
    # replica_groups=mesh['a'=2,'b'=4] {'b'}: along axis b of a mesh
    if groups := re.search(r'replica_groups=mesh\[([^\]]*)\] {([^}]*)}', rest):
        sizes = dict(re.findall(r"('\w+')=(\d+)", groups[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'\w+'", groups[2]))
    # A permutation: each device sends to one other.
    if 'source_target_pairs=' in rest:
        return 2
    return devices


def by_kind(program: Sequence[Collective]) -> dict[str, tuple[int, float]]:
    """Return, for each kind, how many collectives one run of a program executes and the bytes that a device sends.

    Args:
      program: collectives of the program.
    """
    totals = {}
    for kind in KINDS:
        of_kind = [collective for collective in program if collective.kind == kind]
        if of_kind:
            runs = sum(collective.times for collective in of_kind)
            totals[kind] = (runs, sum(collective.sent for collective in of_kind))
    return totals
