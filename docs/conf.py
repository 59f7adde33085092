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
myst_enable_extensions = ['colon_fence', 'dollarmath', 'substitution']
myst_heading_anchors = 4  # a link may name a heading as on GitHub: page.md#some-heading

# Tutorials run in every build: a cached output would hide that a change of the package has broken one.
nb_execution_mode = 'force'
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

# API pages. A name in single backticks is code, and a link where the name is documented.
default_role = 'py:obj'
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

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
    """Return a function's signature as its source has it, so that shapes read `Float[Array, 'batch tokens']`.

    Python's own description of the types of jaxtyping is an address in memory or a long dotted name.
    """
    del app, name, options
    function = inspect.unwrap(obj.__init__ if what == 'class' and not hasattr(obj, '__dataclass_fields__') else obj)
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndentationError):
        return signature, return_annotation
    if not isinstance(node, ast.FunctionDef):
        return signature, return_annotation
    arguments = node.args
    if what in ('method', 'class') and arguments.args and arguments.args[0].arg in ('self', 'cls'):
        arguments.args = arguments.args[1:]
    returns = None if node.returns is None or what == 'class' else ast.unparse(node.returns)
    return f'({ast.unparse(arguments)})', returns


def is_documented_elsewhere(app, what, name, obj, skip, options):
    """Return True for a public name of the package in the page of its module: `api/index.md` documents it."""
    del app, options
    return True if what == 'module' and getattr(sparselora_jax, name, None) is obj else skip


def write_fields(app):
    """Write the tables of all fields of a recipe, which `config.md` includes, from the package's own list."""
    del app
    _title, _, tables = fields_page().partition('\n')
    FIELDS.parent.mkdir(exist_ok=True)
    FIELDS.write_text(tables)


def setup(app):
    """Connect the functions above to Sphinx."""
    app.connect('builder-inited', write_fields)
    app.connect('autodoc-skip-member', is_documented_elsewhere)
    app.connect('autodoc-process-signature', written_signature)
