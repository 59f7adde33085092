"""Score a model on the visual questions of easy-VQA or of a folder, or on tasks.

python launch/evaluate.py --model=runs/demo/exported [--questions=1000] [--data=FOLDER] [--shuffle_images]
python launch/evaluate.py --model=DIR --tasks=vqav2_val,gqa --data_root=DIR --output=DIR [--limit=500]
python launch/evaluate.py --tasks=list --data_root=DIR

Without --data, a model in the workdir of a run is scored on the data of this run, and the embedded model on easy-VQA.
A task is a benchmark whose official files lie under --data_root. Its scores, answers and the file for the server of the
data set are written to --output. Tasks of retrieval need a retrieval model of BLIP-2. The same command continues a run
that was stopped.
"""

# `cli` comes first: it puts the folder of the scripts last on `sys.path`. `dataclasses` imports the standard library's
# `inspect`, and would find `launch/inspect.py`.
import cli

# isort: split

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sparselora_jax import recipe
from sparselora_jax.checkpoints import embedded, graft, load
from sparselora_jax.data import pipeline
from sparselora_jax.data.checked import load_dataset
from sparselora_jax.data.dataset import DataRequest, Mixture
from sparselora_jax.data.loaders import find_loader
from sparselora_jax.evaluation import retrieval, vqa
from sparselora_jax.evaluation.tasks import RETRIEVAL, is_own_data
from sparselora_jax.recipe import CONFIG_FILE, LARGEST_COUNT, ConfigError
from sparselora_jax.runtime import files, processes
from sparselora_jax.runtime.files import StorageError, read_json
from sparselora_jax.runtime.progress import Progress
from sparselora_jax.sparse import sharding

cli.define_model()
cli.define_processes()
MESH = flags.DEFINE_list(
    'mesh',
    None,
    'devices that the model and its batches are split over, as data=4,fsdp=2,tensor=1; default: one device, or with '
    'several processes all devices as data',
)
QUESTIONS = flags.DEFINE_integer('questions', 1000, 'number of test questions', lower_bound=1)
BATCH = flags.DEFINE_integer('batch', 50, 'number of questions answered at a time', lower_bound=1)
SEED = flags.DEFINE_integer(
    'seed', 42, 'seed of the random choice of questions', lower_bound=0, upper_bound=LARGEST_COUNT
)
SHUFFLE = flags.DEFINE_bool(
    'shuffle_images', False, 'pair each question with the image of another one, to measure how much images matter'
)
DATA = flags.DEFINE_string(
    'data', None, "easy_vqa, files and folders of data, or package.module:Name; default: the data of the model's run"
)
DATA_DIR = flags.DEFINE_string(
    'data_dir', None, "folder that easy-VQA is prepared in; default: that of the model's run, otherwise runs/data"
)
TASKS = flags.DEFINE_list('tasks', None, 'names of tasks, or a folder with a data.jsonl; list: print what is there')
DATA_ROOT = flags.DEFINE_string('data_root', None, 'folder under which the files of the tasks lie')
OUTPUT = flags.DEFINE_string('output', None, 'folder for the results of tasks')
LIMIT = flags.DEFINE_integer('limit', None, 'maximum number of items of each task; default: all', lower_bound=1)
OFFSET = flags.DEFINE_integer('offset', 0, 'number of items of each task to leave out at first', lower_bound=0)
CANDIDATES = flags.DEFINE_integer(
    'candidates',
    retrieval.CANDIDATES,
    'of retrieval: number of candidates of each search that are scored again',
    lower_bound=1,
)
VISION_FROM = flags.DEFINE_string(
    'vision_from', None, 'a BLIP-2 whose vision tower replaces that of the retrieval model, as in the paper'
)
TOLERANCE = flags.DEFINE_float(
    'tolerance', 0.0, 'largest share of images that may be missing', lower_bound=0.0, upper_bound=1.0
)
_VISION_FROM_NEEDS = '--vision_from is for tasks of retrieval: name only these, as --tasks=flickr30k_test_retrieval'


def main(argv: list[str]) -> None:
    """Print the accuracy, and the floor: the best accuracy of a model that never sees an image."""
    del argv
    if TASKS.value is not None:
        score_tasks(TASKS.value)
        return
    if VISION_FROM.value is not None:
        raise ConfigError(_VISION_FROM_NEEDS)
    request = choose_data()
    loaded = cli.load_model(mesh=make_mesh())
    model, params, processor, text = loaded
    cli.print_header(f'data {request.data}')
    request = replace(request, misfit=pipeline.misfit(processor, text, answers=False))
    dataset = load_dataset(find_loader(request.data), request)
    train, test = (split.read_texts() for split in (dataset.train, dataset.test))
    indices = vqa.sample(QUESTIONS.value, len(test), seed=SEED.value)
    # A larger batch would be filled with copies of the last question.
    batch = min(BATCH.value, len(indices))
    cli.check_memory(loaded, batch)
    answers = vqa.evaluate(
        model,
        params,
        processor,
        text,
        dataset.test,
        indices,
        batch=batch,
        shuffle_images=SHUFFLE.value,
        progress=Progress('evaluate', len(indices)),
        **text.decoding,
    )
    # The accuracy that questions alone allow. Anything above it must come from the images.
    floor = vqa.blind_floor(train, [test[index] for index in indices])
    scores = {'accuracy': answers, 'image_blind_floor': floor}
    means = {name: score.accuracy(dataset.kind_of) for name, score in scores.items()}
    # The data may have fewer questions than were asked for.
    if processes.first():
        print(json.dumps({'questions': len(indices)} | means, indent=1))


def make_mesh() -> Mesh | None:
    """Return the mesh of `--mesh`; None: one device.

    Raises:
      UsageError: it is no list of axes with their sizes.
      MeshError: the product of the axes is not the number of devices.
    """
    axes = {}
    for part in MESH.value or ():
        name, _, size = part.partition('=')
        if name not in sharding.AXES or name in axes or not re.fullmatch(r'[1-9]\d{0,5}', size):
            raise cli.UsageError(f'--mesh: {part!r} is no axis with its size: expected for example data=4,fsdp=2')
        axes[name] = int(size)
    if not axes:
        if jax.process_count() == 1:
            return None
        axes = {'data': jax.device_count()}
    return sharding.make_mesh(**axes)


def score_tasks(names: list[str]) -> None:
    """Score the model on tasks, and print a table.

    Args:
      names: names of tasks; 'list' prints those that are known.

    Raises:
      ConfigError: no task or no folder is given.
    """
    # Imported here, because scripts without jobs do not need it.
    from sparselora_jax.jobs import evaluate_tasks

    if not names:
        raise ConfigError('--tasks has no value: expected names of tasks, or list')
    # Folders of a user's own need no other files.
    if DATA_ROOT.value is None and not all(is_own_data(name) for name in names):
        raise ConfigError('--tasks needs the folder of their files: add --data_root=DIR')
    data_root = None if DATA_ROOT.value is None else Path(DATA_ROOT.value)
    if names == ['list']:
        print('\n'.join(evaluate_tasks.list_tasks(data_root)))
        return
    if OUTPUT.value is None:
        raise ConfigError('--tasks needs a folder for the results: add --output=DIR')
    values = flags.FLAGS
    request = evaluate_tasks.TaskRequest(
        tasks=tuple(dict.fromkeys(names)),
        data_root=data_root,
        batch=BATCH.value,
        limit=LIMIT.value,
        offset=OFFSET.value,
        tolerance=TOLERANCE.value,
        overrides={name: values[name].value for name in cli.DECODING if values[name].value is not None},
        prompt=values.prompt,
        candidates=CANDIDATES.value,
        vision_from=VISION_FROM.value,
    )
    # What is wrong is told before the files are read, which may take minutes, and missing files before the model is.
    output = Path(OUTPUT.value)
    # The first process holds the folder later, when another one may not have come here yet.
    processes.agreed(lambda: files.refuse_held(output))
    tasks = evaluate_tasks.load_tasks(request)
    if VISION_FROM.value is not None and any(loaded.task.kind != RETRIEVAL for loaded in tasks.values()):
        raise ConfigError(_VISION_FROM_NEEDS)
    mesh = make_mesh()
    loaded = cli.load_model(generates=False, mesh=mesh)
    model, params, processor, _ = loaded
    cli.print_header(f'tasks {", ".join(names)}')
    prepared = evaluate_tasks.prepare(request, tasks, model, processor)
    for task in prepared.values():
        # A search generates no text, and the check counts the memory of generation.
        if task.task.kind != RETRIEVAL:
            text = replace(task.asked.text, decoding=cli.DECODING | task.asked.text.decoding)
            cli.check_memory(loaded._replace(text=text), BATCH.value)
    sources = model_files(model.source, output)
    if VISION_FROM.value is not None:
        params = graft.with_vision_from(model, params, VISION_FROM.value, dtype=values.dtype)
        if mesh is not None:
            params = sharding.shard(params, mesh)
        sources |= files_of_tower(VISION_FROM.value)
    # One process reads the files of the model, and writes.
    owner = processes.agreed(lambda: evaluate_tasks.begin(output, sources, tasks))
    results = evaluate_tasks.evaluate_tasks(
        request,
        prepared,
        model,
        params,
        processor,
        output=output,
        name=values.model,
        owner=owner + values.dtype,
    )
    if processes.first():
        print('\n'.join(evaluate_tasks.table(results)))


def model_files(source: str, output: Path) -> dict[str, Path]:
    """Return the files that decide what the model of `--model` computes, by name.

    Args:
      source: its directory.
      output: folder of the results, whose files do not count if it lies in the directory.
    """
    if flags.FLAGS.model == embedded.NAME:
        return {file.name: file for file in embedded.files()}
    every = _files_of_directory(Path(source))
    return {name: file for name, file in every.items() if not file.resolve().is_relative_to(output.resolve())}


def files_of_tower(vision_from: str) -> dict[str, Path]:
    """Return the files of the model of `--vision_from`, by name.

    Args:
      vision_from: the model.
    """
    named = _files_of_directory(load.find_directory(vision_from))
    return {f'vision_from/{name}': file for name, file in named.items()}


def _files_of_directory(folder: Path) -> dict[str, Path]:
    # Imported here, because scripts without jobs do not need it.
    from sparselora_jax.jobs import inputs

    # Of a packed directory too, whose weights `open_model` does not list.
    return inputs.files_of_directory(folder, folder.glob('*.safetensors'))


def choose_data() -> DataRequest:
    """Return the data to score the model on, and how they are drawn.

    The data are those of `--data`, or those of the run that wrote the model.

    Raises:
      ConfigError: nothing says which data the model is for.
      StorageError: the config of the run cannot be read.
    """
    data_dir = DATA_DIR.value or 'runs/data'
    if DATA.value is not None:
        return DataRequest(DATA.value, Path(data_dir))
    if flags.FLAGS.model == embedded.NAME:
        return DataRequest('easy_vqa', Path(data_dir))
    if not Path(flags.FLAGS.model).exists() and flags.FLAGS.model.count('/') != 1:
        raise StorageError(f'--model={flags.FLAGS.model}: no such directory')
    # A run writes its models into folders of its workdir.
    file = Path(flags.FLAGS.model).absolute().parent / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(
            f'--model={flags.FLAGS.model}: not in the workdir of a run, so its data are not known; add '
            '--data=FOLDER or --data=easy_vqa'
        )
    remedy = 'add --data=FOLDER or --data=easy_vqa'
    fields = read_json(file, remedy)
    data = fields.get('data')
    data_dir = DATA_DIR.value or fields.get('data_dir')
    if not isinstance(data, str) or not isinstance(data_dir, str):
        raise StorageError(f'{file}: not the config of a run; {remedy}')
    # Runs of older versions had no sources to draw records from.
    drawn = recipe.mixture(ConfigDict(fields)) if 'mixture' in fields else Mixture()
    return DataRequest(data, Path(data_dir), mixture=drawn, seed=fields.get('seed', 0))


if __name__ == '__main__':
    cli.run(main)
