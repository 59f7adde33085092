"""List every field of a recipe with its default, its legal values and its meaning.

This is the only list of the fields. `base_config()` builds a recipe's defaults from it, `check_fields` checks the
values, and the `--help_config` of the scripts and the page of the documentation print it.
"""

import difflib
import os
import sys
import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sparselora_jax import pruning
from sparselora_jax.checkpoints import embedded
from sparselora_jax.data.caption_forms import FORMS
from sparselora_jax.data.loaders import absolute_data
from sparselora_jax.evaluation.metric import METRICS
from sparselora_jax.evaluation.tasks import is_own_data
from sparselora_jax.pruning.reconstruct import TARGETS
from sparselora_jax.recipe.config import ConfigError, value_of
from sparselora_jax.recipe.kernel_rules import BASES
from sparselora_jax.restoration import guard
from sparselora_jax.restoration.losses import KL_REDUCTIONS
from sparselora_jax.restoration.restore import TRAINED
from sparselora_jax.sparse.packing import FORMATS
from sparselora_jax.sparse.weights import GRADIENTS

TEACHERS = ('model', 'top_k')
ORDERS = ('shuffled', 'first')
DTYPES = ('float32', 'bfloat16', 'float16')
# JAX counts steps, tokens and indices in 32 bits, and numbers of a schedule or a loss become float32.
LARGEST_COUNT = 2**31 - 1
SMALLEST_FLOAT = float(np.finfo(np.float32).tiny)
LARGEST_FLOAT = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Legal:
    """The legal values of one field, regardless of other fields and of the model.

    Attributes:
      expected: the legal values in words, for errors and for the documentation.
      accepts: function that returns whether a value is legal; it takes values of any type.
    """

    expected: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class Field:
    """One field of a recipe.

    Attributes:
      name: dotted name, for example `restore.steps`.
      default: its default; a dict holds one for each tower.
      legal: its legal values; of a field with a value for each tower, those of each.
      meaning: sentences for the documentation.
      absolute: function that returns a legal value with absolute paths of this machine; None: no value has a path.
    """

    name: str
    default: Any
    legal: Legal
    meaning: str
    absolute: Callable[[str], str] | None = None

    @property
    def is_by_tower(self) -> bool:
        """Return whether the field has a value for each tower."""
        return isinstance(self.default, dict)


def is_whole_number(value: Any) -> bool:
    """Return whether a value is an int; a bool is none.

    Args:
      value: of any type.
    """
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite int or float; a bool is none.

    Args:
      value: of any type.
    """
    # This comparison is False for NaN and for infinity, and works for an int that no float can hold.
    return (is_whole_number(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


def whole_number(low: int, *, note: str = '') -> Legal:
    """Return the rule that a value is a whole number with a lower bound.

    Args:
      low: the lowest legal value.
      note: added to the text.
    """
    return Legal(f'{low}{note} or more', lambda value: is_whole_number(value) and value >= low)


def number(legal_range: Callable[[float], bool], expected: str) -> Legal:
    """Return the rule that a value is a number in a range.

    Args:
      legal_range: function that returns whether a number lies in the range.
      expected: the range in words.
    """
    return Legal(expected, lambda value: is_number(value) and legal_range(value))


def one_of(values: Collection[str], *, others: str = '') -> Legal:
    """Return the rule that a value is one of the given texts.

    Args:
      values: the legal values.
      others: description of further values, which are texts with a colon that are checked where they are looked up.
    """

    def accepts(value: Any) -> bool:
        return isinstance(value, str) and (value in values or (bool(others) and ':' in value))

    return Legal(f'one of {", ".join(values)}{others}', accepts)


def _text(expected: str, *, may_be_empty: bool = False) -> Legal:
    """Return the rule that a value is a text; what it says is checked where it is used."""
    return Legal(expected, lambda value: isinstance(value, str) and (may_be_empty or value.strip() != ''))


POSITIVE = number(lambda value: value > 0, 'a positive number')
NOT_NEGATIVE = number(lambda value: value >= 0, '0 or more')
ANY_NUMBER = number(lambda value: True, 'a number')
COUNT = whole_number(1)
SWITCH = Legal('True or False', lambda value: isinstance(value, bool))
SEED = Legal(f'a whole number from 0 to {LARGEST_COUNT}', lambda value: is_whole_number(value) and value >= 0)
THIRD_PARTY = ', or your own as package.module:Name'
# A format may be registered at any time, so names are looked up when a value is checked.
BASE = Legal(
    f'one of {", ".join(dict.fromkeys((*BASES, *FORMATS)))}{THIRD_PARTY}',
    lambda value: isinstance(value, str) and (value in BASES or value in FORMATS or ':' in value),
)
SHARES = Legal(
    'numbers of 0 or more, one for each kind of answer, or ()',
    lambda value: isinstance(value, tuple | list) and all(is_number(share) and share >= 0 for share in value),
)
WEIGHTS = Legal(
    'positive numbers, one for each source, or ()',
    lambda value: isinstance(value, tuple | list) and all(is_number(weight) and weight > 0 for weight in value),
)
A_FOLDER = _text('a folder')
REGEX = _text('a regular expression')


# Links are not resolved: a path may be one because its target moves, or differs from machine to machine.
def _absolute_path(path: str) -> str:
    return str(Path(path).absolute())


def _absolute_model(model: str) -> str:
    """Return a recipe's model with an absolute path; what does not exist may be a hub id."""
    is_directory = model != embedded.NAME and os.path.exists(model)
    return _absolute_path(model) if is_directory else model


def _if_named(absolute: Callable[[str], str]) -> Callable[[str], str]:
    """Return a function that leaves '' as it is, which names nothing."""
    return lambda value: absolute(value) if value else value


def _absolute_tasks(tasks: str) -> str:
    """Return names of tasks, of which those of folders have absolute paths."""
    names = [name.strip() for name in tasks.split(',')]
    return ','.join(_absolute_path(name) if is_own_data(name) else name for name in names)


FIELDS = (
    # What is pruned, on which data, and on which devices.
    Field(
        'model',
        embedded.NAME,
        _text(f'{embedded.NAME}, a directory or a hub id'),
        'Model to prune: the embedded one (docs/guides/install.md), a Hugging Face directory, or a hub id.',
        absolute=_absolute_model,
    ),
    Field(
        'family',
        '',
        _text("'', a model_type or package.module:FAMILY", may_be_empty=True),
        "Family of the model: '' takes any, by its model_type; a model_type, such as llava, refuses models of other "
        'families; package.module:FAMILY reads the model by a family of your own.',
    ),
    Field(
        'data',
        'easy_vqa',
        _text('easy_vqa, paths separated by commas, or package.module:Name'),
        'Data: easy-VQA; files and folders of images and texts (docs/guides/restoration_data.md), such as a folder '
        'with a data.jsonl; or a loader of your own.',
        absolute=absolute_data,
    ),
    Field(
        'data_dir',
        'runs/data',
        A_FOLDER,
        'Folder for the prepared easy-VQA data and the indices of tar files, which all runs share.',
        absolute=_absolute_path,
    ),
    Field(
        'seed',
        42,
        SEED,
        "Seed of the data order, the calibration samples, the test questions, LoRA's initial factors and random masks.",
    ),
    Field(
        'dtype',
        'float32',
        one_of(DTYPES),
        'Type of the base weights. LoRA, optimizer and statistics are always float32.',
    ),
    # Together these are the number of devices; data and fsdp together split a batch.
    Field('mesh.data', 1, COUNT, 'Number of devices along the mesh axis that splits batches.'),
    Field('mesh.fsdp', 1, COUNT, 'Number of devices along the mesh axis that splits batches and weights.'),
    Field('mesh.tensor', 1, COUNT, 'Number of devices along the mesh axis that splits heads and MLPs.'),
    # The first two steps compile, so they would hide the others.
    Field(
        'profile',
        False,
        SWITCH,
        'Write a profile of restoration steps 3 to 5 to the workdir, for XProf or TensorBoard.',
    ),
    Field(
        'stream',
        False,
        SWITCH,
        'Prune block by block from disk, for a model that does not fit in memory. Not for the embedded model.',
    ),
    # How records are drawn from files of captions, conversations and texts.
    Field(
        'mixture.samples',
        0,
        whole_number(0, note=' (all)'),
        'Number of training records drawn from the sources of `data`, by the seed; 0: all records are used.',
    ),
    Field(
        'mixture.weights',
        (),
        WEIGHTS,
        'Share of each source of `data` in mixture.samples, for example (2, 1). (): equal shares.',
    ),
    # The paper uses the first for BLIP-2, and the second for InstructBLIP.
    Field(
        'mixture.captions',
        'prefix',
        one_of(FORMS),
        'Prompt of a caption. prefix: its beginning, cut at a random character. instruct: a short request for a '
        'caption (`caption_forms.INSTRUCTIONS`).',
    ),
    Field(
        'mixture.clean',
        True,
        SWITCH,
        'Clean captions as the public code of BLIP-2 does: lower case, less punctuation, at most 50 words.',
    ),
    Field(
        'mixture.tolerance',
        0.0,
        number(lambda value: 0 <= value < 1, 'a share from 0 to below 1'),
        "Largest share of a source's images that may be missing or unreadable; their records are left out.",
    ),
    Field(
        'mixture.augment',
        False,
        SWITCH,
        'Crop training images at random to half of their area or more, and mirror half of them; calibration samples '
        'too. Otherwise images are only resized.',
    ),
    # How questions and answers become tokens.
    Field(
        'text.prompt',
        'Question: {} Short answer:',
        _text('a text with {} once'),
        'Prompt template; {} is replaced by the question.',
    ),
    Field('text.prompt_tokens', 16, COUNT, 'Number of tokens that each prompt is padded to.'),
    Field(
        'text.answer_tokens',
        3,
        COUNT,
        'Number of tokens that each answer is padded to, including the end-of-text token.',
    ),
    # Pruning.
    Field('prune.method', 'wanda', one_of(list(pruning.METHODS), others=THIRD_PARTY), 'Pruning method.'),
    # The paper's settings differ in which towers are pruned; these are those of its language-only runs.
    Field(
        'prune.pattern',
        {'vision': 'dense', 'qformer': 'dense', 'language': '2:4'},
        _text('dense, a sparsity such as 0.5, or N:M such as 2:4'),
        "Pattern of each tower's blocks.",
    ),
    Field(
        'prune.group',
        {'vision': 'matrix', 'qformer': 'output', 'language': 'output'},
        _text('output or matrix'),
        'Comparison group of an unstructured pattern: the weights of one output, or all weights of the matrix '
        "(the paper's choice for the ViT). SparseGPT prunes a matrix in blocks of inputs; 'matrix' then means "
        'one such block.',
    ),
    # As many as the paper uses, and SparseGPT and Wanda before it.
    Field(
        'prune.samples',
        128,
        whole_number(0),
        'Number of calibration samples. 0 is for methods without a statistic.',
    ),
    Field(
        'prune.data',
        '',
        _text("'', or as `data`", may_be_empty=True),
        "Data of the calibration samples, in the form of `data`. '': the training records.",
        absolute=_if_named(absolute_data),
    ),
    # The public code of the paper calibrates on the first records of a file.
    Field(
        'prune.order',
        'shuffled',
        one_of(ORDERS),
        'Calibration samples. shuffled: drawn by the seed. first: the first ones, in the order of the files.',
    ),
    Field(
        'prune.chunk',
        32,
        COUNT,
        'Number of calibration samples that each device runs at a time; a higher number takes more memory.',
    ),
    # `layer` is the order in which the committed results were measured.
    Field(
        'prune.sequential',
        'layer',
        one_of(pruning.SEQUENTIAL),
        'What a kernel is calibrated on. layer: on its block before any kernel of the block is pruned, as the code of '
        'Wanda and SparseGPT does; each block runs twice. kernel: on the pruned kernels before it too; each '
        'product runs once, and more activations are in memory.',
    ),
    Field(
        'prune.offload',
        False,
        SWITCH,
        'Whether the activations of the calibration samples wait in the memory of the host. Device memory then holds '
        'those of one chunk; copying takes time.',
    ),
    Field(
        'prune.allocation',
        'uniform',
        one_of(list(pruning.ALLOCATIONS), others=THIRD_PARTY),
        'Allocation of an unstructured sparsity to the layers of all towers. uniform: each layer gets the '
        'sparsity of its pattern.',
    ),
    # ECoFLaP's code has the default 0.8; its published runs use the pattern's sparsity + 0.1.
    Field(
        'prune.highest',
        0.8,
        number(lambda value: 0 < value <= 1, 'a sparsity in (0, 1]'),
        'ECoFLaP and global magnitude: maximum sparsity of a layer.',
    ),
    Field(
        'prune.score_samples',
        32,
        COUNT,
        'ECoFLaP: number of samples for its scores. The zeroth order runs them twice for each kernel and layer.',
    ),
    Field('prune.score_batch', 8, COUNT, 'ECoFLaP: number of samples for its scores that run at a time.'),
    Field(
        'prune.noise', 1e-3, POSITIVE, "ECoFLaP, zeroth order: scale of the noise on a kernel (the paper's epsilon)."
    ),
    Field(
        'prune.outlier',
        5.0,
        POSITIVE,
        "OWL: a score is an outlier above this many times the mean score of its block (the paper's M).",
    ),
    Field(
        'prune.spread',
        0.08,
        POSITIVE,
        "OWL: the sparsities of the layers differ by at most twice this (the paper's lambda).",
    ),
    Field(
        'prune.margin',
        0.1,
        number(lambda value: 0 < value < 1, 'more than 0 and less than 1'),
        "DAS: a layer's sparsity exceeds the largest of its tower by at most this.",
    ),
    Field(
        'prune.damp',
        0.01,
        POSITIVE,
        "SparseGPT (also as DSnoT's initial method) and GPTQ: damping, as a share of the Hessian's mean "
        'diagonal. It is added to the diagonal.',
    ),
    Field(
        'prune.block',
        64,
        COUNT,
        "SparseGPT: number of inputs (columns of the paper's matrix) that are pruned together. It must be a "
        'multiple of M for N:M.',
    ),
    Field(
        'prune.initial',
        'wanda',
        one_of(list(pruning.METHODS), others=THIRD_PARTY),
        'DSnoT: method whose mask it starts from.',
    ),
    Field('prune.cycles', 50, COUNT, 'DSnoT: maximum number of swaps for each output.'),
    # With an infinite threshold DSnoT would change no output.
    Field(
        'prune.threshold',
        0.1 / 2048,
        number(lambda value: value >= 0, '0 or more, per token'),
        "DSnoT: an output is finished once its expected error per token is below this. The public code's 0.1 "
        'is for a sample of 2048 tokens.',
    ),
    # No damp, since that has SparseGPT's default: of a Hessian whose diagonal is 1, ADMM needs more.
    Field(
        'prune.ridge',
        0.1,
        number(lambda value: value >= 0, '0 or more'),
        "ADMM: value added to the normalised Hessian's diagonal, which is 1; it keeps weights near the dense ones.",
    ),
    Field('prune.rho', 1.0, POSITIVE, 'ADMM: penalty; smaller values move weights further in each iteration.'),
    Field('prune.iterations', 20, COUNT, 'ADMM: number of updates of the weights.'),
    Field(
        'prune.growth',
        15,
        COUNT,
        'ADMM: number of iterations in which the mask grows, at most prune.iterations; with 1, the mask is that of '
        'Wanda.',
    ),
    # Reconstruction of each block once it is pruned. The other defaults are those of the library.
    Field(
        'prune.reconstruct.passes',
        0,
        whole_number(0, note=' (off)'),
        'Number of passes over the calibration samples in which the kept weights of each pruned block are trained to '
        "give the dense block's output.",
    ),
    Field(
        'prune.reconstruct.rate',
        pruning.Reconstruct.rate,
        POSITIVE,
        'Highest learning rate of these passes; it falls to 0 along a cosine.',
    ),
    Field(
        'prune.reconstruct.batch',
        pruning.Reconstruct.batch,
        COUNT,
        'Number of samples in a step of these passes, in total over all devices; at most `prune.chunk` on each.',
    ),
    Field(
        'prune.reconstruct.target',
        pruning.Reconstruct.target,
        one_of(TARGETS),
        'Output that a block is trained to give. dense: that of the dense block on the outputs of the dense blocks '
        'before it. pruned: that of the dense block on the outputs of the pruned blocks before it.',
    ),
    # LoRA. The scale of a tower's update is alpha / rank.
    # The paper's ranks. Its alpha is 16 in every tower; here the scale is 2 in every tower.
    Field(
        'lora.rank',
        {'vision': 4, 'qformer': 2, 'language': 8},
        whole_number(0, note=' (leave it alone)'),
        'Rank in each tower; 0 trains nothing in that tower. Towers that are not pruned get LoRA too.',
    ),
    Field(
        'lora.alpha',
        {'vision': 8.0, 'qformer': 4.0, 'language': 16.0},
        POSITIVE,
        'Alpha in each tower: the update is scaled by alpha / rank.',
    ),
    Field(
        'lora.targets',
        {'vision': '.*', 'qformer': '.*', 'language': '.*'},
        REGEX,
        "Regex of the kernels that get LoRA, matched to the path below a tower's blocks, e.g. attn/[qv]/kernel.",
    ),
    # The paper's scripts pass 0.05. The layer that its code then runs, LoRA under the mask, does not apply it.
    Field(
        'lora.dropout',
        0.0,
        number(lambda value: 0 <= value < 1, 'a number from 0 to below 1'),
        "Probability that a kernel's LoRA does not see an entry of its input in a training step; the base sees all. "
        'Above 0, a pruned kernel takes one more matmul in the forward and one more in the backward.',
    ),
    # Restoration. The paper's code runs one epoch of 25k pairs at batch 64 and a constant 1e-4, see configs/paper.
    Field('restore.steps', 100, COUNT, 'Number of optimizer steps.'),
    Field('restore.batch', 8, COUNT, 'Number of samples in a step, in total over all devices and micro-batches.'),
    Field(
        'restore.shares',
        (2, 1, 1),
        SHARES,
        "Shares of easy-VQA's kinds of answers in a batch: yes/no, shape, colour. (): draw without regard to kind.",
    ),
    # The paper trains longer, at 1e-4. The demo's task needs more for its 100 steps.
    Field('restore.peak', 1e-3, POSITIVE, 'Learning rate after the warm-up; it then falls along a cosine.'),
    Field(
        'restore.warmup',
        10,
        whole_number(0),
        'Number of steps in which the learning rate rises from `start` to `peak`.',
    ),
    Field('restore.start', 1e-6, NOT_NEGATIVE, 'Learning rate of the first step.'),
    Field('restore.end', 1e-5, NOT_NEGATIVE, 'Learning rate of the last step.'),
    Field('restore.weight_decay', 0.05, NOT_NEGATIVE, "AdamW's decoupled weight decay."),
    Field(
        'restore.clip',
        1.0,
        number(lambda value: value >= 0, '0 (no limit) or more'),
        'Maximum global norm of the gradient; a larger gradient is scaled down to it.',
    ),
    Field(
        'restore.kd',
        0.1,
        number(lambda value: 0 <= value <= 1, 'a number from 0 to 1'),
        'Weight of distillation in the loss (1 - kd) * CE + kd * KL; with 0, no teacher runs.',
    ),
    # The paper's task class has 2, but its training script passes 1.
    Field('restore.temperature', 2.0, POSITIVE, 'Temperature of the softmax in KL, for teacher and student.'),
    # The paper's code sums over the tokens of an answer, its pads included.
    Field(
        'restore.kl_reduction',
        'token',
        one_of(KL_REDUCTIONS),
        'Averaging of KL: over all answer tokens, or summed over an answer and averaged over samples.',
    ),
    Field(
        'restore.gradient',
        'exact',
        one_of(GRADIENTS),
        'Gradient through the mask. plain: LoRA is trained without the mask, which is applied when it is merged.',
    ),
    Field(
        'restore.trained',
        'lora',
        one_of(TRAINED),
        'Parameters to train: LoRA, or the pruned kernels themselves, under their masks.',
    ),
    Field(
        'restore.base',
        'dense',
        BASE,
        'Storage of pruned kernels while LoRA is trained on them. packed: lossless, 2:4 without its zeros, '
        'other patterns as a bitmask. packed_int4: 2:4 in four bits. int4, nf4: four bits for any pattern, '
        'zeros included. A format by its own name holds all pruned towers. GPTQ rounds to four bits, with the '
        'calibration samples of pruning.',
    ),
    Field(
        'restore.teacher',
        'model',
        one_of(TEACHERS),
        'Teacher: the dense model runs in every step, or its `top_k` likeliest tokens of each position are '
        'first written to the workdir, so that it need not stay in memory (a different loss, '
        '`losses.top_k_kl`).',
    ),
    Field(
        'restore.top_k',
        64,
        COUNT,
        'Number of tokens that the teacher top_k stores for each position; below the size of the vocabulary.',
    ),
    # Both trade time for memory, and change no result but for rounding.
    Field('restore.accumulate', 1, COUNT, 'Number of micro-batches in a step; it must divide the batch.'),
    Field(
        'restore.remat',
        False,
        SWITCH,
        "Recompute a block's activations in the backward pass, which takes time and saves memory.",
    ),
    Field('restore.checkpoint_every', 25, COUNT, 'Number of steps between two checkpoints.'),
    Field(
        'restore.on_bad_step',
        'stop',
        one_of(guard.POLICIES),
        'Reaction to a bad step, whose loss or gradient is not finite or whose loss spikes. stop: the run '
        'ends and the last checkpoint stays. skip: weights and moments are not updated; the run ends after 10 '
        'bad steps in a row.',
    ),
    # With a limit of 1 or less, ordinary steps would count as spikes.
    Field(
        'restore.spike',
        0.0,
        number(lambda value: value == 0 or value > 1, 'more than 1 (times the usual loss), or 0'),
        'A loss spikes if it exceeds this many times the mean loss of the last 50 good steps; 0: never.',
    ),
    Field(
        'restore.control',
        False,
        SWITCH,
        'Train the same LoRA budget on the dense model too. This control shows how much mere training improves.',
    ),
    # Evaluation on the test questions. The paper uses 5 beams, and length penalty -1 (short answers) or 1 (captions).
    Field('evaluate.questions', 1000, COUNT, 'Number of test questions; easy-VQA has 9,673.'),
    Field('evaluate.batch', 50, COUNT, 'Number of questions per batch.'),
    Field(
        'evaluate.metric',
        'exact_match',
        one_of(list(METRICS), others=THIRD_PARTY),
        'Metric of an answer; exact_match ignores case, not punctuation.',
    ),
    Field(
        'evaluate.tasks',
        '',
        _text('names of tasks, separated by commas', may_be_empty=True),
        'Tasks that each model is scored on too: benchmarks (docs/guides/tasks.md), or folders with a data.jsonl. '
        "Prompts and decoding are those of the model's family.",
        absolute=_absolute_tasks,
    ),
    Field(
        'evaluate.data_root',
        '',
        _text('a folder', may_be_empty=True),
        'Folder under which the files of the tasks lie, in any layout.',
        absolute=_if_named(_absolute_path),
    ),
    Field('evaluate.limit', 0, whole_number(0), 'Maximum number of items of each task; 0: all.'),
    Field('evaluate.num_beams', 1, COUNT, 'Number of beams; 1 is greedy decoding.'),
    Field('evaluate.max_new_tokens', 4, COUNT, 'Maximum number of tokens in an answer.'),
    Field('evaluate.min_length', 0, whole_number(0), 'Minimum number of tokens, including those of the prompt.'),
    Field(
        'evaluate.length_penalty',
        1.0,
        ANY_NUMBER,
        "A beam's score is its log-probability / length ** length_penalty. A value above 0 favours long "
        'answers, below 0 short ones.',
    ),
    Field(
        'evaluate.repetition_penalty',
        1.0,
        POSITIVE,
        'Above 1, tokens that the prompt or the answer has already are less likely. The paper uses 1.5 for the answers '
        'of InstructBLIP.',
    ),
)


def default_config() -> ConfigDict:
    """Return a recipe with every field at its default."""
    config = ConfigDict()
    for field in FIELDS:
        *parents, name = field.name.split('.')
        part = config
        for parent in parents:
            if parent not in part:
                part[parent] = ConfigDict()
            part = part[parent]
        part[name] = ConfigDict(field.default) if field.is_by_tower else field.default
    return config


def check_value(name: str, value: Any, legal: Legal) -> None:
    """Check the value of one field.

    Args:
      name: dotted name, for the error.
      value: of any type.
      legal: its legal values.

    Raises:
      ConfigError: it is not legal; names the field, the value, and what is expected.
    """
    expected = legal.expected
    is_legal = legal.accepts(value)
    # These bounds are the same for all fields, so they are not part of each text.
    if is_legal and is_whole_number(value) and abs(value) > LARGEST_COUNT:
        is_legal = False
        expected = f'at most {LARGEST_COUNT}'
    if is_legal and isinstance(value, float) and value != 0 and not SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT:
        is_legal = False
        expected = f'a number that float32 can hold, from {SMALLEST_FLOAT:.1e} to {LARGEST_FLOAT:.1e} in size'
    if is_legal and isinstance(value, str) and not _is_clean(value):
        is_legal = False
        expected = 'text without null characters and lone surrogates'
    if not is_legal:
        # A wrong value may be a whole page, for example another config.
        shown = ' '.join(repr(value).split())
        shown = shown if len(shown) <= 80 else f'{shown[:77]}...'
        raise ConfigError(f'{name} {shown}: expected {expected}')


def _is_clean(text: str) -> bool:
    """Return whether a text can be a path, and can be written as UTF-8."""
    return '\0' not in text and not any('\ud800' <= character <= '\udfff' for character in text)


def check_fields(config: ConfigDict) -> None:
    """Check that a config has every field of a recipe, each with a legal value.

    Args:
      config: the recipe.

    Raises:
      ConfigError: a field is missing or illegal.
    """
    for field in FIELDS:
        try:
            value = value_of(config, field.name)
        except (KeyError, TypeError, AttributeError):
            raise ConfigError(
                f'config has no field {field.name!r}: expected {field.legal.expected}; begin with base_config() of '
                'configs/base.py, which sets every field'
            ) from None
        if not field.is_by_tower:
            check_value(field.name, value, field.legal)
        elif not isinstance(value, ConfigDict) or not value:
            raise ConfigError(f'{field.name} {value!r}: expected a value for each tower')
        else:
            for tower in value:
                check_value(f'{field.name}.{tower}', value[tower], field.legal)


def check_names(names: Collection[str], options: Collection[str] = ()) -> None:
    """Check that every name is that of a field, a group of fields, or a tower's value.

    Args:
      names: dotted names.
      options: further fields that it may have: the options of a method or an allocation of the user's own.

    Raises:
      ConfigError: a name is unknown; the message suggests the nearest one.
    """
    by_tower = {field.name for field in FIELDS if field.is_by_tower}
    known = {field.name for field in FIELDS} | set(options)
    known |= {name.rpartition('.')[0] for name in known if '.' in name}
    for name in names:
        parent, _, _ = name.rpartition('.')
        if name not in known and parent not in by_tower:
            raise ConfigError(f'config has no field {name!r}; did you mean {nearest(name, known)!r}?')


def nearest(name: str, names: Collection[str]) -> str:
    """Return the most similar of some names.

    Args:
      name: a name that does not exist.
      names: those that do.
    """
    # No cutoff: with so few names, even a distant nearest name is a useful hint.
    return difflib.get_close_matches(name, sorted(names), 1, cutoff=0.0)[0]


def fields_text() -> str:
    """Return the list of all fields as plain text, for a terminal."""
    paragraphs = []
    for field in FIELDS:
        head = f'--config.{field.name}={_default_text(field)}'
        body = f'{field.meaning} Expected: {_expected_text(field)}.'
        paragraphs.append(f'{head}\n{textwrap.indent(textwrap.fill(body, 92), "    ")}')
    return '\n'.join(paragraphs)


def fields_page() -> str:
    """Return the list of all fields as a Markdown page, one table for each group of fields."""
    lines = [
        '# Fields of a recipe',
        '',
        'Set a field with `--config.NAME=VALUE`, for example `--config.restore.steps=300`. Values are checked before '
        f'any work begins. Whole numbers are at most {LARGEST_COUNT:,}.',
    ]
    # Fields of one group need not follow each other in the list.
    groups: dict[str, list[Field]] = {}
    for field in FIELDS:
        groups.setdefault(field.name.rpartition('.')[0], []).append(field)
    for group, fields in groups.items():
        lines += ['', f'## {f"`{group}`" if group else "General"}', '']
        lines += ['| field | default | expected | meaning |', '|---|---|---|---|']
        for field in fields:
            # A bar would end the cell of a table.
            cells = [f'`{field.name}`', f'`{_default_text(field)}`', _expected_text(field), field.meaning]
            lines.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |')
    return '\n'.join([*lines, ''])


def _default_text(field: Field) -> str:
    """Return the default of a field as text."""
    if field.is_by_tower:
        return ', '.join(f'{tower}: {value}' for tower, value in field.default.items())
    return repr(field.default) if field.default == '' else f'{field.default}'


def _expected_text(field: Field) -> str:
    """Return the legal values of a field as text."""
    return f'for each tower, {field.legal.expected}' if field.is_by_tower else field.legal.expected
