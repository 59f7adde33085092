"""Define what the paper's recipes share (arXiv 2404.02424): the values that its public code runs.

  python launch/train.py --config=configs/paper/instructblip_flan_t5_xl.py:pattern=2:4,hardware=8gpu --workdir=runs/xl

`docs/reproduce.md` says which files are needed, where these recipes and the code differ, which scores the paper has,
and what was compiled at which cost. The scripts of the code override its YAML files and its defaults; the values here
are those of the scripts. Arguments: `arguments.py`. Both the vision and the language tower get the pattern; `0.5`,
`2:4` (the default) and `4:8` are in the paper's tables. To prune the language tower alone, add
`--config.prune.pattern.vision=dense`.

Paths are below the current folder: the files of a data set may lie elsewhere if a link leads there. Name other paths
with `--config.data=`, `--config.prune.data=` and `--config.evaluate.data_root=`.
"""

from ml_collections import ConfigDict

from configs import arguments, hub_model

# Sources of image-caption pairs, see docs/guides/restoration_data.md.
CC3M = 'data/cc3m'
COCO = 'data/coco/annotations/coco_karpathy_train.json::data/coco'
VISUAL_GENOME = 'data/vg/annotations/vg_caption.json::data/vg'
PAIRS = 25_000  # drawn in equal shares from the sources; the run is one epoch of them
TASKS = 'ok_vqa_val2014,gqa,nocaps_val,vqav2_val'
GPUS = 2  # on which the paper's scripts run


def base_config(
    model: str, arg: str | None, *, family: str, data: str, captions: str, gpu_batch: int, calibration: str = ''
) -> ConfigDict:
    """Return the recipe of one of the paper's models.

    Args:
      model: hub id.
      arg: the text after the colon of `--config=FILE:...`; see `arguments.py`.
      family: transformers' `model_type`.
      data: sources of the pairs that the model is restored on.
      captions: form of the prompts, a `mixture.captions`.
      gpu_batch: batch on each GPU in the paper's scripts.
      calibration: sources of the calibration samples; '': those of `data`.
    """
    config = hub_model.base_config(model, family=family)
    # The code runs in half precision too: float16, and bfloat16 for T5.
    config.dtype = 'bfloat16'
    _set_data(config, data, captions, calibration)
    _set_lora(config)
    _set_training(config, gpu_batch)
    _set_evaluation(config, family)
    # Both towers get the pattern, and the Q-Former only LoRA.
    return arguments.apply(config, arg, pruned=('vision', 'language'))


def _set_data(config: ConfigDict, data: str, captions: str, calibration: str) -> None:
    """Set the pairs and the calibration samples."""
    config.data = data
    config.mixture.samples = PAIRS
    config.mixture.captions = captions
    config.mixture.clean = True
    # Calibration reads augmented images too.
    config.mixture.augment = True
    config.prune.data = calibration
    # The code takes the first samples of the file, in their order.
    config.prune.order = 'first'
    config.prune.samples = 128
    # A caption is its own prompt.
    config.text.prompt = '{}'
    # Longer texts are left out, where the code cuts them: captions of 50 words have at most about 70 tokens.
    config.text.prompt_tokens = 32
    config.text.answer_tokens = 32 if captions == 'prefix' else 64


def _set_lora(config: ConfigDict) -> None:
    """Set the adapted kernels: all of the blocks of every tower, with the same alpha."""
    config.lora.rank = ConfigDict({'vision': 4, 'qformer': 2, 'language': 8})
    config.lora.alpha = ConfigDict({'vision': 16.0, 'qformer': 16.0, 'language': 16.0})
    # The scripts pass it. The code's layer for LoRA under the mask does not apply it: `--config.lora.dropout=0` is what
    # the code computes.
    config.lora.dropout = 0.05


def _set_training(config: ConfigDict, gpu_batch: int) -> None:
    """Set one epoch of AdamW at a constant rate."""
    restore = config.restore
    restore.batch = GPUS * gpu_batch
    # Each GPU leaves out its last, smaller batch.
    restore.steps = PAIRS // GPUS // gpu_batch
    # The rate is `start` in the first step and `peak` in all others: the code's cosine would begin in a second epoch.
    restore.warmup = 1
    restore.start = 1e-6
    restore.peak = 1e-4
    restore.end = 1e-4
    restore.weight_decay = 0.0
    restore.clip = 0.0
    restore.kd = 0.1
    restore.temperature = 1.0
    # The code's 'batchmean' divides the sum over tokens by the batch. It also sums over pads, which are left out here.
    restore.kl_reduction = 'sequence'


def _set_evaluation(config: ConfigDict, family: str) -> None:
    """Set the benchmarks, and the decoding of the captions that were held out of the pairs.

    The prompts and the decoding of benchmarks are those of the family (`Family.task_format`).
    """
    evaluate = config.evaluate
    evaluate.tasks = TASKS
    evaluate.data_root = 'data'
    # Captions equal none of the references, so these questions only show that the run is sound.
    evaluate.questions = 100
    evaluate.num_beams = 5
    evaluate.length_penalty = 1.0
    evaluate.repetition_penalty = 1.5 if family == 'instructblip' else 1.0
    evaluate.max_new_tokens = config.text.answer_tokens
