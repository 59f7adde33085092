"""Language-only pruning of BLIP-2 at 2:4 by Wanda, restored by SparseLoRA (arXiv 2404.02424, 'language only').

  python launch/train.py --config=configs/blip2_lang_only.py --workdir=runs/demo

The embedded model (SmolLM2-135M-Instruct and a bridge trained on easy-VQA). Any field can be overridden, e.g.
`--config.restore.steps=300`.

Cost: 10 minutes on 2 slow CPU cores (restoring 4.8), 2.7 GiB. Accuracy on 1,000 test questions: dense
99.4 %, pruned 51.2 %, restored 99.6 %; perplexity of the language tower 38, 424, 448. `--config.restore.control=True`
trains the same LoRA budget on the dense model too.
"""

from ml_collections import ConfigDict

from configs import arguments


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: see `configs/arguments.py`."""
    return arguments.apply(base(), arg, pruned=('language',))


def base() -> ConfigDict:
    """Every field, language only."""
    config = ConfigDict()
    config.model = 'embedded'  # or a Hugging Face directory, or a hub id
    config.data = 'easy_vqa'  # or a folder of images with a data.jsonl (sparselora_jax/data/folder.py)
    config.data_dir = 'runs/data'  # where easy-VQA is prepared
    config.seed = 42
    config.dtype = 'float32'  # of the base weights; LoRA, optimiser and statistics are always float32
    config.mesh = ConfigDict({'data': 1, 'fsdp': 1, 'tensor': 1})  # devices along each axis
    config.profile = False  # True: steps 3 to 5 of restoration are traced; XProf and TensorBoard open the workdir
    config.stream = False  # True: prune block by block from disk, for a model that memory does not hold
    config.text = ConfigDict({'prompt': 'Question: {} Short answer:', 'prompt_tokens': 16, 'answer_tokens': 3})

    # Pruning: a pattern per tower (dense | 0.5 | 2:4 | 4:8), over the kernels of its blocks.
    config.prune = ConfigDict()
    config.prune.method = 'wanda'  # random | magnitude | wanda | sparsegpt | dsnot
    config.prune.pattern = ConfigDict({'vision': 'dense', 'qformer': 'dense', 'language': '2:4'})
    # Unstructured patterns compare the weights of one output, or of the whole matrix (the paper's ViT); SparseGPT goes
    # block by block and takes 'matrix' as the whole block.
    config.prune.group = ConfigDict({'vision': 'matrix', 'qformer': 'output', 'language': 'output'})
    config.prune.samples = 128
    config.prune.chunk = 32  # samples at a time, on each device
    # How the zeros that unstructured patterns ask for are shared out over the layers of all towers (uniform: each layer
    # has what its pattern says): uniform | global_magnitude | owl | ecoflap_first | ecoflap_zeroth.
    config.prune.allocation = 'uniform'
    # ECoFLaP and global magnitude: no layer gets sparser than this (ECoFLaP's default; its runs: the pattern's sparsity
    # + 0.1). What ECoFLaP's scores are taken from (the zeroth order runs these samples twice for each kernel and
    # layer), and eps of its noise.
    config.prune.highest = 0.8
    config.prune.score_samples = 32
    config.prune.score_batch = 8
    config.prune.noise = 1e-3
    # OWL: an outlier exceeds this many times the mean score of its block (M); ratios differ by 2 * spread (lambda).
    config.prune.outlier = 5.0
    config.prune.spread = 0.08
    config.prune.damp = 0.01  # SparseGPT (also as DSnoT's initial method), as is `block`; GPTQ of a base in four bits
    config.prune.block = 64
    # DSnoT only: whose mask it starts from, the most swaps of an output, and the expected error of an output, per
    # token, below which it is left alone (the public code's 0.1 is per sample of 2048 tokens).
    config.prune.initial = 'wanda'  # random | magnitude | wanda | sparsegpt
    config.prune.cycles = 50
    config.prune.threshold = 0.1 / 2048

    # LoRA: the paper's ranks; rank 0 leaves a tower alone. The scale is alpha / rank.
    config.lora = ConfigDict()
    config.lora.rank = ConfigDict({'vision': 4, 'qformer': 2, 'language': 8})
    config.lora.alpha = ConfigDict({'vision': 8.0, 'qformer': 4.0, 'language': 16.0})
    # Which kernels of a tower's blocks, by regex over the rest of the path, e.g. 'attn/[qv]/kernel'.
    config.lora.targets = ConfigDict({'vision': '.*', 'qformer': '.*', 'language': '.*'})

    # Restoration. The paper: one epoch of 25k pairs at batch 32, 1000 warm-up steps to 1e-4. This run is shorter
    # (100 steps of 8), so its peak is higher.
    config.restore = ConfigDict()
    config.restore.steps = 100
    config.restore.batch = 8
    config.restore.shares = (2, 1, 1)  # yes/no, shape, colour; (): records as they come
    config.restore.peak = 1e-3
    config.restore.warmup = 10
    config.restore.start = 1e-6
    config.restore.end = 1e-5
    config.restore.weight_decay = 0.05
    config.restore.clip = 1.0
    config.restore.kd = 0.1
    config.restore.temperature = 2.0
    config.restore.kl_reduction = 'token'  # token | sequence
    config.restore.gradient = 'exact'  # exact | straight_through | plain (LoRA beside the mask, cut at the merge)
    config.restore.trained = 'lora'  # lora | weights (the pruned kernels themselves, under their masks)
    # What pruned kernels are held as while LoRA is trained on them (QSparseLoRA): dense | packed (2:4 without its
    # zeros, others as a bitmask; lossless) | packed_int4 (2:4 in four bits) | int4 | nf4 (any pattern, zeros included).
    # What four bits hold is chosen by GPTQ on the samples of pruning.
    config.restore.base = 'dense'
    # model: the dense model runs beside the student. top_k: its top_k likeliest tokens of each position are written to
    # the workdir before, so it need not be in memory; a loss of its own (losses.top_k_kl).
    config.restore.teacher = 'model'
    config.restore.top_k = 64
    config.restore.accumulate = 1  # micro-batches a step
    config.restore.remat = False  # True: a block's activations are computed again in the backward, less memory
    config.restore.checkpoint_every = 25
    # A step is bad if its loss or a gradient is not finite or, unless `spike` is 0, if the loss is more than so many
    # times the mean of the last 50 good ones. stop: the run ends, the last checkpoint stays. skip: weights and moments
    # stay as they are, and the run ends at 10 bad steps in a row.
    config.restore.on_bad_step = 'stop'
    config.restore.spike = 0.0
    # True: train the same LoRA budget on the dense model too, to tell restoring from more training.
    config.restore.control = False

    config.evaluate = ConfigDict()
    config.evaluate.questions = 1000  # of 9,673
    config.evaluate.batch = 50
    config.evaluate.metric = 'exact_match'  # a registered metric (evaluation/metric.py), or package.module:Name
    # Of generate; the paper: 5 beams, length penalty -1 (short answers) or 1 (captions).
    config.evaluate.num_beams = 1
    config.evaluate.max_new_tokens = 4
    config.evaluate.min_length = 0
    config.evaluate.length_penalty = 1.0

    return config
