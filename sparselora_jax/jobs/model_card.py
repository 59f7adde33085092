"""Write the model card (README.md) of an exported directory, from the template `templates/model_card.md.jinja`."""

from pathlib import Path

import jinja2

from sparselora_jax import __version__, recipe
from sparselora_jax.checkpoints import embedded
from sparselora_jax.checkpoints.checkpoint_files import CONFIG
from sparselora_jax.data.loaders import is_path
from sparselora_jax.data.sources.place import split_names
from sparselora_jax.jobs import names
from sparselora_jax.jobs.job import Job
from sparselora_jax.runtime.files import read_json
from sparselora_jax.sparse.patterns import parse_pattern

FILE = 'README.md'
FENCE = '---'  # line before and after the YAML head of a card

_ZEROS_STORED = 'Zeros are stored, so the files are as large as those of the base model.'
_OWN_FILE = 'stored without the zeros, in a file that only sparselora-jax reads.'
# How a directory stores the weights, by its name.
_STORAGE = {
    names.PRUNED_MODEL: _ZEROS_STORED,
    names.EXPORTED_MODEL: _ZEROS_STORED,
    'packed': f'Pruned kernels are {_OWN_FILE}',
    'packed_int4': f'The kept weights of 2:4 kernels are rounded to four bits. Pruned kernels are {_OWN_FILE}',
    'packed_lora': f'The low-rank updates are not merged: they lie beside the pruned kernels, {_OWN_FILE}',
}
_DENSE_FILES = (names.PRUNED_MODEL, names.EXPORTED_MODEL)  # directories that transformers loads
# Without escaping, because the card is Markdown, not HTML.
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader('sparselora_jax.jobs'),
    autoescape=False,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
)

Row = list[str | int]


def write_card(job: Job, folder: str, sparsity: dict[str, dict]) -> str:
    """Return the model card of a directory that a run exports.

    Args:
      job: the run.
      folder: name of the directory in the workdir.
      sparsity: counts of each tower, see `export.count_zeros`.
    """
    config = job.config
    is_restored = folder != names.PRUNED_MODEL
    scores = _scores(job, is_restored)
    metric = recipe.metric(config).title
    beams = config.evaluate.num_beams
    has_perplexity = any(len(row) > 2 for row in scores)
    is_dense = folder in _DENSE_FILES
    patterns = dict.fromkeys(counts['pattern'] for counts in sparsity.values())
    # Not by density: a dense tower may have a weight that is zero by itself.
    pruned_patterns = [pattern for pattern in patterns if not parse_pattern(pattern).dense]
    return _TEMPLATES.get_template('model_card.md.jinja').render(
        library='transformers' if is_dense else 'sparselora-jax',
        base_model=_base_model(job),
        base_name=_base_name(job),
        tags=['sparse', 'pruned', 'sparselora-jax', *pruned_patterns],
        storage=_STORAGE[folder],
        sparsity=_sparsity(sparsity),
        pruning=_pruning(job),
        restoration=_restoration(job) if is_restored else [],
        is_lora=config.restore.trained == 'lora',
        scores=scores,
        score_head=['model', metric, 'perplexity'] if has_perplexity else ['model', metric],
        has_perplexity=has_perplexity,
        questions=_questions(job),
        data=_data_name(config.data),
        decoding='greedily' if beams == 1 else f'with {beams} beams',
        architecture=_architecture(job) if is_dense else '',
        prompt=job.text.prompt,
        version=__version__,
        base_card=_base_card(job),
    )


def _questions(job: Job) -> int:
    """Return how many questions were scored: the data may have fewer than the recipe asks for."""
    scored = job.read_result(names.evaluation_stage('dense'))
    return 0 if scored is None else len(scored['true'])


def _last_part(path: str) -> str:
    """Return the last part of a path: a card must not tell where its writer keeps files."""
    return Path(path).name


def _data_name(data: str) -> str:
    """Return the names of data without the folders in which they are."""
    if not is_path(data):
        return _last_part(data)
    return ', '.join(_last_part(source.path) for source in split_names(data))


def _base_model(job: Job) -> str:
    """Return the hub id of the base model, or '' if it was read from a directory."""
    if job.config.model == embedded.NAME:
        return embedded.BASE
    return '' if Path(job.config.model).exists() else job.config.model


def _base_name(job: Job) -> str:
    """Return the name of the base model in a sentence."""
    if job.config.model == embedded.NAME:
        return f'{_last_part(embedded.BASE)} with a small BLIP-2 bridge'
    return _base_model(job) or _last_part(job.config.model)


def _architecture(job: Job) -> str:
    """Return transformers' class that loads the model."""
    if job.model.source is None:
        return 'Blip2ForConditionalGeneration'
    hf = read_json(Path(job.model.source) / CONFIG, 'download it again')
    # `save_pretrained` always writes the class; a config that was written by hand may lack it.
    return (hf.get('architectures') or ['AutoModelForImageTextToText'])[0]


def _sparsity(sparsity: dict[str, dict]) -> list[Row]:
    return [
        [tower, counts['pattern'], f'{counts["weights"]:,}', f'{counts["density"]:.2%}', counts['violations']]
        for tower, counts in sparsity.items()
    ]


def _pruning(job: Job) -> list[Row]:
    prune = job.config.prune
    # Towers may differ in their comparison group, which is an option of some methods; a dense tower has no method.
    rules = zip(recipe.prune_rules(job.config), recipe.prune_methods(job.config), strict=True)
    methods = dict.fromkeys(f'`{method}`' for (_, pattern), (_, method) in rules if not pattern.dense)
    rows: list[Row] = [['method', ', '.join(methods)], ['zeros per layer', f'`{prune.allocation}`']]
    if prune.samples > 0:
        data = _data_name(prune.data or job.config.data)
        order = 'the first' if prune.order == 'first' else 'random'
        rows.append(['calibration', f'{prune.samples} samples of {data}, {order} ones'])
    if options := recipe.reconstruction(job.config):
        rows.append(['reconstruction', f'`{options}`'])
    rows.append(['seed', job.config.seed])
    return rows


def _restoration(job: Job) -> list[Row]:
    config = job.config
    restore = config.restore
    rows: list[Row] = []
    if restore.trained == 'lora':
        ranks = ', '.join(f'{tower} {rank}' for tower, rank in config.lora.rank.items() if rank)
        rows.append(['trained', f'LoRA under the masks, of rank {ranks}'])
        if config.lora.dropout:
            rows.append(['dropout of inputs of LoRA', f'{config.lora.dropout:g}'])
    else:
        rows.append(['trained', 'the kept weights of pruned kernels'])
    rows.append(['data', f'{restore.steps} steps of {restore.batch} samples of {_data_name(config.data)}'])
    rows.append(['loss', f'{1 - restore.kd:g} x cross-entropy + {restore.kd:g} x KL to the dense model'])
    rows.append(['peak learning rate', f'{restore.peak:g}'])
    rows.append(['gradient', f'`{restore.gradient}`'])
    if restore.base != 'dense':
        rows.append(['base while training', f'`{restore.base}`'])
    return rows


def _scores(job: Job, is_restored: bool) -> list[Row]:
    """Return the score and the perplexity of each model that was evaluated; none if the exported one was not."""
    results = {name: job.read_result(names.evaluation_stage(name)) for name in names.MODELS}
    if results['restored' if is_restored else 'pruned'] is None:
        return []
    rows: list[Row] = []
    for name, result in results.items():
        if result is None or (name == 'restored' and not is_restored):
            continue
        row: Row = [name, f'{result["accuracy"]["overall"]:.1%}']
        if 'perplexity' in result:  # only a decoder-only language tower has one
            row.append(f'{result["perplexity"]:.1f}')
        rows.append(row)
    return rows


def _base_card(job: Job) -> str:
    """Return the card of the directory that the model was read from, as it is; '' if it has none."""
    if job.model.source is None:
        return ''
    file = Path(job.model.source) / FILE
    if not file.is_file():
        return ''
    # Bytes that are not UTF-8 become surrogates, which `write_texts` turns back into the same bytes.
    card = file.read_bytes().decode(errors='surrogateescape')
    parts = card.split(f'{FENCE}\n', 2)
    if len(parts) == 3 and parts[0] == '':
        # A second head would be read as a line and a heading, so it is quoted.
        return f'```yaml\n{parts[1]}```\n{parts[2]}'
    return card
