"""Configure the documentation site, which `make docs` builds: Sphinx, Markdown pages, and tutorials that run."""

import ast
import inspect
import os
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIELDS = ROOT / 'docs' / '_build' / 'fields.md'
sys.path.insert(0, str(ROOT))

# For the code of the tutorials, which runs in processes of its own. Tables of results need no progress bars or hints.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])

import sparselora_jax
from sparselora_jax.recipe.fields import fields_page

project = 'sparselora-jax'
author = 'The sparselora-jax authors'
version = release = sparselora_jax.__version__

extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx_copybutton',
    'sphinx_design',
]
exclude_patterns = ['_build']

# Markdown.
myst_enable_extensions = ['colon_fence']
myst_heading_anchors = 4  # a link may name a heading as on GitHub: page.md#some-heading

# Tutorials run in every build: a cached output would hide that a change of the package has broken one.
nb_execution_mode = 'force'
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = 'remove'  # hints of other libraries, such as a missing progress bar

# API pages. A name in single backticks is code, and a link where the name is documented.
default_role = 'py:obj'
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

# Appearance.
html_theme = 'sphinx_book_theme'
html_title = 'sparselora-jax'
html_static_path = ['_static']
html_css_files = ['site.css']
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    'show_toc_level': 2,
    'use_download_button': False,
    'use_fullscreen_button': False,
    'home_page_in_toc': True,
}
copybutton_prompt_text = r'>>> |\.\.\. |\$ '
copybutton_prompt_is_regexp = True


def written_signature(app, what, name, obj, options, signature, return_annotation):
    """Return a signature as the source has it, so that shapes read `Float[Array, 'batch tokens']`.

    Python's own description of a type of jaxtyping names a private module of JAX.
    """
    del app, name, options
    if what == 'class' and (fields := written_fields(obj)):
        return f'({", ".join(fields.values())})', None
    function = inspect.unwrap(obj.__init__ if what == 'class' else obj)
    node = parsed(function)
    if not isinstance(node, ast.FunctionDef):
        return signature, return_annotation
    arguments = node.args
    if what in ('method', 'class') and arguments.args and arguments.args[0].arg in ('self', 'cls'):
        arguments.args = arguments.args[1:]
    returns = None if node.returns is None or what == 'class' else ast.unparse(node.returns)
    return f'({ast.unparse(arguments)})', returns


def parsed(obj):
    """Return the syntax tree of a class or function, or None if it has no source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None


def written_fields(kind):
    """Return the fields of a dataclass or named tuple, inherited ones first, each as `name: type = default`."""
    if not (hasattr(kind, '__dataclass_fields__') or hasattr(kind, '_fields')):
        return {}
    fields = {}
    for ancestor in reversed(kind.__mro__):
        node = None if ancestor is object else parsed(ancestor)
        for line in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(line, ast.AnnAssign) and 'ClassVar' not in ast.unparse(line.annotation):
                fields[line.target.id] = ast.unparse(line)
    # The machinery of `tuple` and of protocols has annotations that are no fields.
    names = kind._fields if hasattr(kind, '_fields') else kind.__dataclass_fields__
    return {name: text for name, text in fields.items() if name in names}


def is_left_out(app, what, name, obj, skip, options):
    """Return True for what another place documents, otherwise Sphinx's own choice.

    A public name of the package is on `api/index.md`, so the page of its module leaves it out. The docstring of a class
    describes its fields. Python would describe them again: by the index in a named tuple, or by a default that is a
    built-in function.
    """
    del app, options
    is_public = what == 'module' and getattr(sparselora_jax, name, None) is obj
    is_field = what == 'class' and (isinstance(obj, type(inspect.FullArgSpec.args)) or inspect.isbuiltin(obj))
    return True if is_public or is_field else skip


def write_fields(app):
    """Write the tables of all fields of a recipe, which `config.md` includes, from the package's own list."""
    del app
    _title, _, tables = fields_page().partition('\n')
    FIELDS.parent.mkdir(exist_ok=True)
    FIELDS.write_text(tables)


def setup(app):
    """Connect the functions above to Sphinx."""
    app.connect('builder-inited', write_fields)
    app.connect('autodoc-skip-member', is_left_out)
    app.connect('autodoc-process-signature', written_signature)
