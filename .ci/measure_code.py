"""Measure structure and readability of the code (docs/design.md): `python .ci/measure_code.py [FOLDER]`.

Structure is measured on the whole package, and readability on FOLDER (default: the package). With `--check`, the script
ends with code 1 if a figure misses its bound.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / 'sparselora_jax'

# First words of a docstring that count as a verb in the imperative.
VERBS = {
    'abort',
    'accept',
    'accumulate',
    'act',
    'add',
    'adjust',
    'advance',
    'aggregate',
    'align',
    'allocate',
    'allow',
    'annotate',
    'answer',
    'append',
    'apply',
    'approximate',
    'arrange',
    'ask',
    'assemble',
    'assign',
    'attach',
    'average',
    'be',
    'begin',
    'bind',
    'broadcast',
    'build',
    'calculate',
    'calibrate',
    'call',
    'cast',
    'check',
    'choose',
    'claim',
    'clean',
    'clear',
    'clip',
    'close',
    'collect',
    'combine',
    'compare',
    'compile',
    'complete',
    'compress',
    'compute',
    'concatenate',
    'configure',
    'connect',
    'construct',
    'contract',
    'convert',
    'copy',
    'correct',
    'count',
    'cover',
    'create',
    'cut',
    'deal',
    'decide',
    'decode',
    'declare',
    'decompress',
    'define',
    'delete',
    'dequantise',
    'derive',
    'describe',
    'detect',
    'determine',
    'disable',
    'discard',
    'divide',
    'do',
    'download',
    'draw',
    'drop',
    'dump',
    'embed',
    'enable',
    'encode',
    'end',
    'enforce',
    'enter',
    'estimate',
    'evaluate',
    'exclude',
    'exit',
    'expand',
    'explain',
    'export',
    'extend',
    'extract',
    'fill',
    'filter',
    'find',
    'finish',
    'fit',
    'fix',
    'flatten',
    'fold',
    'follow',
    'force',
    'forget',
    'format',
    'gather',
    'generate',
    'get',
    'give',
    'group',
    'guard',
    'guess',
    'handle',
    'hash',
    'hold',
    'identify',
    'ignore',
    'import',
    'index',
    'infer',
    'init',
    'initialise',
    'insert',
    'inspect',
    'install',
    'interpolate',
    'invert',
    'iterate',
    'join',
    'keep',
    'label',
    'lay',
    'lift',
    'limit',
    'link',
    'list',
    'load',
    'locate',
    'lock',
    'log',
    'look',
    'lower',
    'make',
    'map',
    'mark',
    'mask',
    'match',
    'materialise',
    'measure',
    'merge',
    'mirror',
    'move',
    'multiply',
    'name',
    'normalise',
    'note',
    'observe',
    'offer',
    'open',
    'order',
    'pack',
    'pad',
    'parse',
    'partition',
    'pass',
    'perform',
    'permute',
    'perturb',
    'pick',
    'place',
    'plan',
    'plot',
    'point',
    'pop',
    'predict',
    'prefix',
    'prepare',
    'print',
    'process',
    'project',
    'propose',
    'protect',
    'prune',
    'push',
    'put',
    'quantise',
    'raise',
    'rank',
    'read',
    'rebuild',
    'receive',
    'recompute',
    'record',
    'reduce',
    'refuse',
    'register',
    'release',
    'remove',
    'rename',
    'render',
    'repeat',
    'replace',
    'replicate',
    'report',
    'request',
    'reserve',
    'reshape',
    'resize',
    'resolve',
    'restore',
    'restrict',
    'resume',
    'retrieve',
    'return',
    'reuse',
    'reverse',
    'rewrite',
    'rotate',
    'round',
    'run',
    'sample',
    'save',
    'say',
    'scale',
    'scan',
    'scatter',
    'score',
    'search',
    'select',
    'send',
    'separate',
    'serialise',
    'set',
    'shard',
    'share',
    'shift',
    'show',
    'shrink',
    'shuffle',
    'simulate',
    'skip',
    'slice',
    'solve',
    'sort',
    'split',
    'spread',
    'stack',
    'start',
    'step',
    'stop',
    'store',
    'stream',
    'strip',
    'subtract',
    'sum',
    'summarise',
    'swap',
    'switch',
    'take',
    'tell',
    'test',
    'tie',
    'tile',
    'time',
    'tokenise',
    'total',
    'trace',
    'track',
    'train',
    'transform',
    'translate',
    'transpose',
    'truncate',
    'try',
    'tune',
    'turn',
    'unflatten',
    'unpack',
    'unstack',
    'update',
    'use',
    'validate',
    'verify',
    'visit',
    'wait',
    'walk',
    'warn',
    'watch',
    'weigh',
    'wrap',
    'write',
    'yield',
    'zero',
}

# For each figure, its bound, and whether the figure must be at least ('>=') or at most ('<=') that bound.
BOUNDS = {
    'entries at the package root': ('<=', 13),
    'levels of imports between rooms': ('<=', 11),
    'circles between rooms': ('<=', 0),
    'comments per 1,000 lines of code': ('>=', 90),
    'docstrings that begin with a verb, %': ('>=', 90),
    'tuple assignments of unrelated values': ('<=', 20),
    'arguments annotated Any, per 1,000 lines': ('<=', 6),
}


def package_imports() -> dict[str, set[str]]:
    """Return the rooms that each room of the package imports."""
    imports: dict[str, set[str]] = {}
    for file in PACKAGE.rglob('*.py'):
        room = file.relative_to(PACKAGE).parts[0].removesuffix('.py')
        found = imports.setdefault(room, set())
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or '').startswith(PACKAGE.name):
                continue
            inside = node.module.split('.')[1:]
            found |= {inside[0]} if inside else {alias.name for alias in node.names}
    rooms = imports.keys() - {'__init__'}
    return {room: (imports[room] & rooms) - {room} for room in imports}


def levels(imports: dict[str, set[str]]) -> tuple[int, int]:
    """Return (number of import levels of the rooms, number of rooms in an import cycle)."""
    level: dict[str, int] = {}
    left = dict(imports)
    while left:
        ready = [room for room, needed in left.items() if needed <= level.keys()]
        if not ready:
            break
        for room in ready:
            needed = left.pop(room)
            level[room] = 1 + max((level[other] for other in needed), default=0)
    return max(level.values(), default=0), len(left)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Yield every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def begins_with_a_verb(docstring: str) -> bool:
    """Return whether the first word of a docstring is a verb in the imperative."""
    first = re.match(r'[A-Za-z-]+', docstring)
    return bool(first) and first[0].lower() in VERBS


def count_file(file: Path) -> dict[str, int]:
    """Count lines of code, comments, docstrings, tuple assignments and `Any` in one file."""
    source = file.read_text()
    tree = ast.parse(source)
    strings: set[int] = set()  # lines of docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings |= set(range(node.lineno, node.end_lineno + 1))
    comments = 0
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments += not token.string.startswith(('# noqa', '# type:', '# isort', '# fmt'))
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            code |= set(range(token.start[0], token.end[0] + 1))
    docstrings = [text for node in functions(tree) if (text := ast.get_docstring(node))]
    pairs = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
    ]
    arguments = [
        argument
        for node in functions(tree)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if isinstance(argument.annotation, ast.Name) and argument.annotation.id == 'Any'
    ]
    return {
        'lines': source.count('\n'),
        'lines of code': len(code - strings),
        'comments': comments,
        'docstrings': len(docstrings),
        'begin with a verb': sum(map(begins_with_a_verb, docstrings)),
        'tuple assignments': len(pairs),
        'Any': len(arguments),
    }


def measure(folder: Path) -> dict[str, float]:
    """Return the figures, with the names in `BOUNDS` as keys."""
    total: dict[str, int] = {}
    for file in sorted(folder.rglob('*.py')):
        for name, count in count_file(file).items():
            total[name] = total.get(name, 0) + count
    lines = max(total['lines of code'], 1)
    height, circles = levels(package_imports())
    entries = [path for path in PACKAGE.iterdir() if path.name != '__pycache__']
    return {
        'entries at the package root': len(entries),
        'levels of imports between rooms': height,
        'circles between rooms': circles,
        'comments per 1,000 lines of code': 1000 * total['comments'] / lines,
        'docstrings that begin with a verb, %': 100 * total['begin with a verb'] / max(total['docstrings'], 1),
        'tuple assignments of unrelated values': total['tuple assignments'],
        'arguments annotated Any, per 1,000 lines': 1000 * total['Any'] / max(total['lines'], 1),
    }


def main() -> None:
    """Print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', nargs='?', type=Path, default=PACKAGE)
    parser.add_argument('--check', action='store_true', help='end with code 1 if a figure misses its bound')
    arguments = parser.parse_args()
    missed = 0
    for name, value in measure(arguments.folder).items():
        relation, bound = BOUNDS[name]
        holds = value >= bound if relation == '>=' else value <= bound
        missed += not holds
        print(f'{"holds" if holds else "MISSED"} | {name}: {value:.4g} ({relation} {bound})')
    if arguments.check and missed:
        sys.exit(1)


if __name__ == '__main__':
    main()
