"""Every field of a recipe, with its default. This file is no recipe itself: `blip2_lang_only.py` is the one to copy.

A recipe calls `base_config()`, changes what it wants, and lets `arguments.apply` set the patterns. On the command line
each field is `--config.NAME=VALUE`, e.g. `--config.restore.steps=300`. `sparselora_jax/recipe.py` checks the values
before any work begins.
"""

from ml_collections import ConfigDict


def base_config() -> ConfigDict:
    """Return every field with its default: the embedded model on easy-VQA, its language tower pruned at 2:4."""
    config = ConfigDict()
    # The model: 'embedded' (comes with this repository), a Hugging Face directory, or a hub id.
    config.model = 'embedded'
    # The family that reads the model: '' for that of its model_type, or one of your own as package.module:FAMILY.
    config.family = ''
    # The data: 'easy_vqa', a folder of images with a data.jsonl (sparselora_jax/data/folder.py), or a loader as
    # package.module:Name.
    config.data = 'easy_vqa'
    # Folder that easy-VQA is prepared in, once for all runs.
    config.data_dir = 'runs/data'
    # Seed of the data order, the calibration samples, the test questions, LoRA's initial factors and random masks.
    config.seed = 42
    # Type of the base weights: float32 | bfloat16 | float16. LoRA, optimizer and statistics are always float32.
    config.dtype = 'float32'
    # Number of devices along each axis: `data` splits batches, `fsdp` batches and weights, `tensor` heads and MLPs.
    config.mesh = ConfigDict({'data': 1, 'fsdp': 1, 'tensor': 1})
    # True: write a profile of the steps 3 to 5 of restoration, for XProf or TensorBoard, into the workdir.
    config.profile = False
    # True: prune block by block from disk, for a model that does not fit in memory. Not for the embedded model.
    config.stream = False
    # How a question is written ({} stands for it), the number of tokens that each prompt is padded to, and the number
    # of tokens that each answer is padded to, the end of text included.
    config.text = ConfigDict({'prompt': 'Question: {} Short answer:', 'prompt_tokens': 16, 'answer_tokens': 3})

    # Pruning.
    config.prune = ConfigDict()
    # The method: random | magnitude | wanda | sparsegpt | dsnot.
    config.prune.method = 'wanda'
    # The pattern of each tower's blocks: dense | a sparsity in (0, 1) such as 0.5 | N:M such as 2:4 or 4:8.
    config.prune.pattern = ConfigDict({'vision': 'dense', 'qformer': 'dense', 'language': '2:4'})
    # Which weights an unstructured pattern compares: those of one output, or of the whole matrix (the paper's choice
    # for the ViT). SparseGPT prunes a matrix in blocks of inputs; 'matrix' then means one such block.
    config.prune.group = ConfigDict({'vision': 'matrix', 'qformer': 'output', 'language': 'output'})
    # Number of calibration samples, from the training set.
    config.prune.samples = 128
    # Number of calibration samples that each device runs at a time; more take more memory.
    config.prune.chunk = 32
    # How an unstructured sparsity is allocated to the layers of all towers: uniform (each layer gets its pattern's) |
    # global_magnitude | owl | ecoflap_first | ecoflap_zeroth.
    config.prune.allocation = 'uniform'
    # ECoFLaP and global magnitude: highest sparsity of a layer, in (0, 1]. 0.8 is the default of ECoFLaP's code; its
    # published runs take the pattern's sparsity + 0.1.
    config.prune.highest = 0.8
    # ECoFLaP: number of samples that its scores are computed from, and how many run at a time. The zeroth order runs
    # them twice for each kernel and layer.
    config.prune.score_samples = 32
    config.prune.score_batch = 8
    # ECoFLaP, zeroth order: scale of the noise on a kernel (the paper's epsilon); above 0.
    config.prune.noise = 1e-3
    # OWL: a score is an outlier above this many times the mean score of its block (the paper's M); above 0.
    config.prune.outlier = 5.0
    # OWL: the sparsities of the layers differ by at most twice this (the paper's lambda); above 0.
    config.prune.spread = 0.08
    # SparseGPT (also as DSnoT's initial method) and GPTQ: share of the Hessian's mean diagonal that is added to it.
    config.prune.damp = 0.01
    # SparseGPT: number of inputs (columns of the paper's matrix) that are pruned together, a multiple of M for N:M.
    config.prune.block = 64
    # DSnoT: the method whose mask it starts from: random | magnitude | wanda | sparsegpt.
    config.prune.initial = 'wanda'
    # DSnoT: highest number of swaps for each output.
    config.prune.cycles = 50
    # DSnoT: an output is left alone once its expected error per token is below this. The public code's 0.1 is for a
    # sample of 2048 tokens.
    config.prune.threshold = 0.1 / 2048

    # LoRA. The scale of a tower's update is alpha / rank.
    config.lora = ConfigDict()
    # Rank in each tower, the paper's; 0 trains nothing in that tower. It does not depend on which towers are pruned.
    config.lora.rank = ConfigDict({'vision': 4, 'qformer': 2, 'language': 8})
    # Alpha in each tower; above 0.
    config.lora.alpha = ConfigDict({'vision': 8.0, 'qformer': 4.0, 'language': 16.0})
    # Regex of the kernels that get LoRA, over the path below a tower's blocks, e.g. 'attn/[qv]/kernel'.
    config.lora.targets = ConfigDict({'vision': '.*', 'qformer': '.*', 'language': '.*'})

    # Restoration. The paper trains one epoch of 25k pairs at batch 32, with 1000 warm-up steps to 1e-4.
    config.restore = ConfigDict()
    # Number of optimizer steps.
    config.restore.steps = 100
    # Number of samples in a step, over all devices and micro-batches.
    config.restore.batch = 8
    # Shares of easy-VQA's kinds of answers in a batch: yes/no, shape, colour. (): records as they come.
    config.restore.shares = (2, 1, 1)
    # Learning rate: it rises from `start` to `peak` in `warmup` steps, then falls to `end` along a cosine.
    config.restore.peak = 1e-3
    config.restore.warmup = 10
    config.restore.start = 1e-6
    config.restore.end = 1e-5
    # AdamW's decoupled weight decay.
    config.restore.weight_decay = 0.05
    # Highest global norm of the gradient; a longer gradient is scaled down to it.
    config.restore.clip = 1.0
    # Weight of distillation in the loss (1 - kd) * CE + kd * KL, in [0, 1]; 0 runs no teacher.
    config.restore.kd = 0.1
    # Temperature of the softmax in KL, for teacher and student; above 0.
    config.restore.temperature = 2.0
    # How KL is averaged: token (over all answer tokens) | sequence (summed over an answer, averaged over samples).
    config.restore.kl_reduction = 'token'
    # Gradient through the mask: exact | straight_through | plain (LoRA beside the mask, cut by it when merged).
    config.restore.gradient = 'exact'
    # What is trained: lora | weights (the pruned kernels themselves, under their masks).
    config.restore.trained = 'lora'
    # How pruned kernels are stored while LoRA is trained on them (QSparseLoRA): dense | packed (lossless: 2:4 without
    # its zeros, other patterns as a bitmask) | packed_int4 (2:4 in four bits) | int4 | nf4 (both for any pattern, zeros
    # included). GPTQ rounds to four bits, on the calibration samples of pruning.
    config.restore.base = 'dense'
    # The teacher: model (the dense model runs beside the student) | top_k (the dense model's `top_k` likeliest tokens
    # of each position are written to the workdir first, so it need not stay in memory; a loss of its own,
    # `losses.top_k_kl`).
    config.restore.teacher = 'model'
    config.restore.top_k = 64
    # Number of micro-batches in a step; it divides the batch.
    config.restore.accumulate = 1
    # True: compute a block's activations again in the backward, which takes time and saves memory.
    config.restore.remat = False
    # Number of steps between two checkpoints.
    config.restore.checkpoint_every = 25
    # What to do at a bad step, one whose loss or gradient is not finite or whose loss spikes. stop: the run ends, the
    # last checkpoint stays. skip: weights and moments stay as they are; the run ends after 10 bad steps in a row.
    config.restore.on_bad_step = 'stop'
    # A loss spikes if it exceeds this many times the mean loss of the last 50 good steps; above 1, or 0: never.
    config.restore.spike = 0.0
    # True: train the same LoRA budget on the dense model too, to tell restoration from further training.
    config.restore.control = False

    # Evaluation on the test questions.
    config.evaluate = ConfigDict()
    # Number of questions; easy-VQA has 9,673.
    config.evaluate.questions = 1000
    # Number of questions that are answered at a time.
    config.evaluate.batch = 50
    # What an answer scores: a registered metric (sparselora_jax/evaluation/metric.py), or package.module:Name.
    config.evaluate.metric = 'exact_match'
    # Decoding. The paper: 5 beams, length penalty -1 (short answers) or 1 (captions).
    # Number of beams; 1 is greedy decoding.
    config.evaluate.num_beams = 1
    # Highest number of tokens in an answer.
    config.evaluate.max_new_tokens = 4
    # Lowest number of tokens, those of the prompt included.
    config.evaluate.min_length = 0
    # A beam's score is its log-probability / length ** length_penalty: above 0 favours long answers, below 0 short.
    config.evaluate.length_penalty = 1.0

    return config
