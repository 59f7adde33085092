"""What a compiled program sends between devices, read from its text: kinds, bytes, and how often, loops counted."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')
_HEAD = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) (?:\([^\n]*)?-> [^\n]*{$', re.M)
_OPERATION = re.compile(r'^ *(?:ROOT )?%?[\w.\-]+ = (.+?) ([a-z][a-z\d\-]*)\((.*)$', re.M)
_ARRAY = re.compile(r'\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')  # the bits of a number, the shape
_CALLED = re.compile(r'(?:to_apply|calls|body|called_computations|branch_computations)=(?:{([^}]*)}|%?([\w.\-]+))')


class Collective(NamedTuple):
    """One operation of a program.

    Attributes:
      kind: of `KINDS`.
      size: bytes of what it leaves on a device.
      group: devices that take part together.
      times: how often it runs in one run of the program.
    """

    kind: str
    size: int
    group: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all its runs, by the ring algorithms that reach the least."""
        others = self.group - 1
        each = {
            'all-gather': self.size * others / self.group,
            'all-reduce': 2 * self.size * others / self.group,
            'reduce-scatter': self.size * others,
            'all-to-all': self.size * others / self.group,
        }
        return float(self.times * each.get(self.kind, self.size if others else 0))


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of a compiled program, `compiled.as_text()`.

    Args:
      devices: how many run the program; a collective that names no groups is among all of them.

    Raises:
      ValueError: a collective in a loop of which the compiler does not know how often it runs.
    """
    heads = list(_HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    parts = {head[1]: text[head.end() : end] for head, end in zip(heads, ends, strict=True)}
    entry = next(head[1] for head in heads if head[0].startswith('ENTRY'))
    return list(_walk(parts, entry, 1, devices, set()))


def _walk(parts: dict[str, str], name: str, times: int, devices: int, seen: set[str]) -> Iterator[Collective]:
    """Of a computation and those that it calls.

    Args:
      seen: channels of this round of the innermost loop; a TPU's compiler writes a collective down in each of the
        fusions that start it, compute beside it and end it.
    """
    for result, operation, rest in _OPERATION.findall(parts[name]):
        kind = operation.removesuffix('-start')
        if kind in KINDS:
            channel = re.search(r'channel_id=(\d+)', rest)
            if channel and channel[1] in seen:
                continue
            seen |= {channel[1]} if channel else set()
            yield Collective(kind, _size(result, started=operation != kind), _group(rest, devices), times)
            continue
        for listed, one in _CALLED.findall(rest):
            for called in re.findall(r'[\w.\-]+', listed) if listed else [one]:
                if operation != 'while':
                    yield from _walk(parts, called, times, devices, seen)
                    continue
                inside = list(_walk(parts, called, times, devices, set()))
                if inside and (rounds := _rounds(parts, rest)) is None:
                    raise ValueError(f'{inside[0].kind} in a loop ({called}) whose number of rounds is not known')
                yield from (found._replace(times=found.times * rounds) for found in inside)


def _rounds(parts: dict[str, str], rest: str) -> int | None:
    """Of a loop: as the compiler says it, or by its counter, from 0: what it is compared with, and what is added."""
    if said := re.search(r'"known_trip_count":{"n":"(\d+)"}', rest):
        return int(said[1])
    condition, body = (parts[re.search(rf'{name}=%?([\w.\-]+)', rest)[1]] for name in ('condition', 'body'))
    compared = re.search(r'ROOT [^\n]* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT', condition)
    if not compared or (limit := _constant(condition, compared[2])) is None:
        return None
    place = re.search(rf'%?{re.escape(compared[1])} = [^\n]*get-tuple-element\([^\n]*index=(\d+)', condition)
    after = re.search(r'ROOT [^\n]* tuple\(([^\n)]*)\)', body)
    if not place or not after:
        return None
    counter = re.sub(r'/\*index=\d+\*/', '', after[1]).split(', ')[int(place[1])].removeprefix('%')
    grown = re.search(rf'%?{re.escape(counter)} = \S+ add\(%?[\w.\-]+, %?([\w.\-]+)\)', body)
    step = _constant(body, grown[1]) if grown else None
    return -(-limit // step) if step else None


def _constant(part: str, name: str) -> int | None:
    found = re.search(rf'%?{re.escape(name)} = [su]32\[\]\S* constant\((\d+)\)', part)
    return int(found[1]) if found else None


def _size(result: str, *, started: bool) -> int:
    """Of the arrays that an operation leaves; one that is started leaves its operands beside them, before."""
    arrays = [
        math.prod(int(n) for n in shape.split(',') if n) * int(bits or 8) // 8 for bits, shape in _ARRAY.findall(result)
    ]
    if started and result.startswith('(('):  # ((operands), (results), ...)
        arrays = arrays[len(arrays) // 2 :]
    elif started and result.startswith('('):  # (operand, result, ...): what comes behind is a word or two
        arrays = arrays[1:2]
    return sum(arrays)


def _group(rest: str, devices: int) -> int:
    if found := re.search(r'replica_groups=\[(\d+),(\d+)\]', rest):
        return int(found[2])
    if found := re.search(r'replica_groups={{([\d,]+)}', rest):
        return len(found[1].split(','))
    if found := re.search(r'replica_groups=mesh\[([^\]]*)\] {([^}]*)}', rest):
        sizes = dict(re.findall(r"('\w+')=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'\w+'", found[2]))
    if 'source_target_pairs=' in rest:
        return 2
    return devices


def by_kind(found: list[Collective]) -> dict[str, tuple[int, float]]:
    """{kind: (operations that run, bytes that a device sends)} of one run of a program."""
    return {
        kind: (sum(c.times for c in found if c.kind == kind), sum(c.sent for c in found if c.kind == kind))
        for kind in KINDS
        if any(c.kind == kind for c in found)
    }
