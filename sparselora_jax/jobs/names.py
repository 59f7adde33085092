"""Names of the models that a run evaluates, of its stages, and of the files that these write into the workdir."""

import os

# Models that every report compares, in the order of its tables.
MODELS = ('dense', 'pruned', 'restored')
# The dense model after the same training, to show the effect of training alone; evaluated only if a recipe asks for it.
CONTROL = 'control'
ALL_MODELS = (*MODELS, CONTROL)
# Titles of the two baselines in reports.
FLOOR_TITLE = 'image-blind floor'
CONTROL_TITLE = 'dense, same LoRA budget'

# Stages. The result of each lies in `<stage>.json`.
ZEROS = 'zeros'
PRUNE = 'prune'
ROUND = 'round'
TEACHER = 'teacher'  # also the folder of the teacher's logits
EXPORT = 'export'
EXPORT_PRUNED = 'export_pruned'
FLOOR = 'floor'
MEASURE = 'measured'  # the last stage of a run of a sweep
TRAINING = {'restored': 'restore', CONTROL: 'control'}  # model -> the stage that trains it
PACKED = ('packed', 'packed_int4', 'packed_lora')  # stages of launch/export.py, and their folders
STAGES = (
    *(f'evaluate_{model}' for model in ALL_MODELS),
    *(f'tasks_{model}' for model in ALL_MODELS),  # only if the recipe names tasks
    ZEROS,
    PRUNE,
    ROUND,
    TEACHER,
    *TRAINING.values(),
    EXPORT,
    EXPORT_PRUNED,
    *PACKED,
    FLOOR,
    MEASURE,
)

# Files and folders.
ENVIRONMENTS = 'environments.json'  # versions and devices of every process that computed a stage
INPUTS = 'inputs.json'  # digests of the model's files and of the records, see `inputs.py`
MASKS = 'masks.safetensors'
KERNELS = 'kernels.safetensors'  # kernels whose kept weights pruning changed; missing if it changed none
ROUNDED = 'rounded.safetensors'  # kernels with values that four bits can hold, see `stages.round_base`
CHECKPOINTS = 'checkpoints'
PRUNED_MODEL = 'pruned'  # a Hugging Face directory, written by launch/prune.py only
EXPORTED_MODEL = 'exported'  # a Hugging Face directory
ADAPTER = 'adapter'  # a PEFT directory
FAILED = 'failed.txt'  # why a run of a sweep failed
OUTPUT = 'output.txt'  # what a run of a sweep printed
EDITABLE = ('README.md',)  # texts of exported directories that users edit: a licence is added to a card


def result_file(stage: str) -> str:
    """Return the name of the file with a stage's result.

    Args:
      stage: its name.
    """
    return f'{stage}.json'


def evaluation_stage(model: str) -> str:
    """Return the name of the stage that evaluates a model.

    Args:
      model: one of `ALL_MODELS`.
    """
    return f'evaluate_{model}'


def task_stage(model: str) -> str:
    """Return the name of the stage that scores a model on tasks, which is also the folder of its results.

    Args:
      model: one of `ALL_MODELS`.
    """
    return f'tasks_{model}'


def task_title(task: str) -> str:
    """Return the name of a task for tables and names of files: of a user's own data, their last part.

    Args:
      task: a registered name, `package.module:Name`, a folder, or a `.jsonl` file. These need not be on this machine.

    >>> task_title('gqa'), task_title('my.tasks:CATS'), task_title('data/cats/'), task_title('data/dogs.jsonl')
    ('gqa', 'my.tasks:CATS', 'cats', 'dogs')
    """
    # Names that are no folders have no slash, so they are the last part themselves. Absolute, since '.' has no name.
    return os.path.basename(os.path.abspath(task)).removesuffix('.jsonl')


def trained_file(stage: str) -> str:
    """Return the name of the file with the tree that a stage has trained.

    Args:
      stage: one of `TRAINING`'s values.
    """
    return f'{stage}.safetensors'
