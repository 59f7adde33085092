"""Define every field of a recipe with its default; to write a recipe, copy `blip2_lang_only.py`.

A recipe calls `base_config()`, changes some fields, and lets `arguments.apply` set the patterns. On the command line,
set a field with `--config.NAME=VALUE`, e.g. `--config.restore.steps=300`. `sparselora_jax/recipe/` checks the values
before any work begins.
"""

from ml_collections import ConfigDict


def base_config() -> ConfigDict:
    """Return every field with its default: the embedded model on easy-VQA, its language tower pruned at 2:4."""
    config = ConfigDict()
    # The model: 'embedded' (part of this repository), a Hugging Face directory, or a hub id.
    config.model = 'embedded'
    # The family that loads the model: '' to choose it by model_type, or your own as package.module:FAMILY.
    config.family = ''
    # The data: 'easy_vqa', a folder of images with a data.jsonl (sparselora_jax/data/folder.py), or a loader as
    # package.module:Name.
    config.data = 'easy_vqa'
    # Folder for the prepared easy-VQA data, which all runs share.
    config.data_dir = 'runs/data'
    # Seed of the data order, the calibration samples, the test questions, LoRA's initial factors and random masks.
    config.seed = 42
    # Type of the base weights: float32 | bfloat16 | float16. LoRA, optimizer and statistics are always float32.
    config.dtype = 'float32'
    # Number of devices along each mesh axis: `data` splits batches, `fsdp` splits batches and weights, `tensor` splits
    # heads and MLPs.
    config.mesh = ConfigDict({'data': 1, 'fsdp': 1, 'tensor': 1})
    # True: write a profile of restoration steps 3 to 5 to the workdir, for XProf or TensorBoard.
    config.profile = False
    # True: prune block by block from disk, for a model that does not fit in memory. Not for the embedded model.
    config.stream = False
    # Prompt template ({} is replaced by the question), number of tokens that each prompt is padded to, and number of
    # tokens that each answer is padded to, including the end-of-text token.
    config.text = ConfigDict({'prompt': 'Question: {} Short answer:', 'prompt_tokens': 16, 'answer_tokens': 3})

    # Pruning.
    config.prune = ConfigDict()
    # The method: random | magnitude | wanda | ria | sparsegpt | dsnot, or one of your own as package.module:Name.
    config.prune.method = 'wanda'
    # The pattern of each tower's blocks: dense | a sparsity in (0, 1) such as 0.5 | N:M such as 2:4 or 4:8.
    config.prune.pattern = ConfigDict({'vision': 'dense', 'qformer': 'dense', 'language': '2:4'})
    # Comparison group of an unstructured pattern: output (the weights of one output) | matrix (all weights of the
    # matrix, the paper's choice for the ViT). SparseGPT prunes a matrix in blocks of inputs; 'matrix' then means one
    # such block.
    config.prune.group = ConfigDict({'vision': 'matrix', 'qformer': 'output', 'language': 'output'})
    # Number of calibration samples, from the training set.
    config.prune.samples = 128
    # Number of calibration samples that each device runs at a time; a higher number takes more memory.
    config.prune.chunk = 32
    # Allocation of an unstructured sparsity to the layers of all towers: uniform (each layer gets the sparsity of its
    # pattern) | global_magnitude | owl | ecoflap_first | ecoflap_zeroth.
    config.prune.allocation = 'uniform'
    # ECoFLaP and global magnitude: maximum sparsity of a layer, in (0, 1]. ECoFLaP's code has the default 0.8; its
    # published runs use the pattern's sparsity + 0.1.
    config.prune.highest = 0.8
    # ECoFLaP: number of samples for its scores, and number that run at a time. The zeroth order runs the samples twice
    # for each kernel and layer.
    config.prune.score_samples = 32
    config.prune.score_batch = 8
    # ECoFLaP, zeroth order: scale of the noise on a kernel (the paper's epsilon); above 0.
    config.prune.noise = 1e-3
    # OWL: a score is an outlier above this many times the mean score of its block (the paper's M); above 0.
    config.prune.outlier = 5.0
    # OWL: the sparsities of the layers differ by at most twice this (the paper's lambda); above 0.
    config.prune.spread = 0.08
    # SparseGPT (also as DSnoT's initial method) and GPTQ: damping, as a share of the Hessian's mean diagonal. It is
    # added to the diagonal.
    config.prune.damp = 0.01
    # SparseGPT: number of inputs (columns of the paper's matrix) that are pruned together. It must be a multiple of M
    # for N:M.
    config.prune.block = 64
    # DSnoT: the method whose mask it starts from: random | magnitude | wanda | ria | sparsegpt.
    config.prune.initial = 'wanda'
    # DSnoT: maximum number of swaps for each output.
    config.prune.cycles = 50
    # DSnoT: an output is finished once its expected error per token is below this. The public code's 0.1 is for a
    # sample of 2048 tokens.
    config.prune.threshold = 0.1 / 2048

    # LoRA. The scale of a tower's update is alpha / rank.
    config.lora = ConfigDict()
    # Rank in each tower (the paper's values); 0 trains nothing in that tower. Towers that are not pruned get LoRA too.
    config.lora.rank = ConfigDict({'vision': 4, 'qformer': 2, 'language': 8})
    # Alpha in each tower; above 0.
    config.lora.alpha = ConfigDict({'vision': 8.0, 'qformer': 4.0, 'language': 16.0})
    # Regex of the kernels that get LoRA, matched to the path below a tower's blocks, e.g. 'attn/[qv]/kernel'.
    config.lora.targets = ConfigDict({'vision': '.*', 'qformer': '.*', 'language': '.*'})

    # Restoration. The paper trains one epoch of 25k pairs at batch 32, with 1000 warm-up steps to 1e-4.
    config.restore = ConfigDict()
    # Number of optimizer steps.
    config.restore.steps = 100
    # Number of samples in a step, in total over all devices and micro-batches.
    config.restore.batch = 8
    # Shares of easy-VQA's kinds of answers in a batch: yes/no, shape, colour. (): draw without regard to kind.
    config.restore.shares = (2, 1, 1)
    # Learning rate: rises from `start` to `peak` in `warmup` steps, then falls to `end` along a cosine.
    config.restore.peak = 1e-3
    config.restore.warmup = 10
    config.restore.start = 1e-6
    config.restore.end = 1e-5
    # AdamW's decoupled weight decay.
    config.restore.weight_decay = 0.05
    # Maximum global norm of the gradient; a larger gradient is scaled down to it.
    config.restore.clip = 1.0
    # Weight of distillation in the loss (1 - kd) * CE + kd * KL, in [0, 1]; with 0, no teacher runs.
    config.restore.kd = 0.1
    # Temperature of the softmax in KL, for teacher and student; above 0.
    config.restore.temperature = 2.0
    # Averaging of KL: token (over all answer tokens) | sequence (summed over an answer, averaged over samples).
    config.restore.kl_reduction = 'token'
    # Gradient through the mask: exact | straight_through | plain (LoRA is trained without the mask, which is applied
    # when it is merged).
    config.restore.gradient = 'exact'
    # Parameters to train: lora | weights (the pruned kernels themselves, under their masks).
    config.restore.trained = 'lora'
    # Storage of pruned kernels while LoRA is trained on them (QSparseLoRA): dense | packed (lossless: 2:4 without its
    # zeros, other patterns as a bitmask) | packed_int4 (2:4 in four bits) | int4 | nf4 (both for any pattern, zeros
    # included). GPTQ rounds to four bits, with the calibration samples of pruning.
    config.restore.base = 'dense'
    # The teacher: model (the dense model runs in every step) | top_k (the dense model's `top_k` likeliest tokens of
    # each position are first written to the workdir, so the dense model need not stay in memory; this has a different
    # loss, `losses.top_k_kl`).
    config.restore.teacher = 'model'
    config.restore.top_k = 64
    # Number of micro-batches in a step; it must divide the batch.
    config.restore.accumulate = 1
    # True: recompute a block's activations in the backward pass, which takes time and saves memory.
    config.restore.remat = False
    # Number of steps between two checkpoints.
    config.restore.checkpoint_every = 25
    # Reaction to a bad step, whose loss or gradient is not finite or whose loss spikes. stop: the run ends and the last
    # checkpoint stays. skip: weights and moments are not updated; the run ends after 10 bad steps in a row.
    config.restore.on_bad_step = 'stop'
    # A loss spikes if it exceeds this many times the mean loss of the last 50 good steps; above 1, or 0: never.
    config.restore.spike = 0.0
    # True: train the same LoRA budget on the dense model too. This control shows how much mere training improves.
    config.restore.control = False

    # Evaluation on the test questions.
    config.evaluate = ConfigDict()
    # Number of questions; easy-VQA has 9,673.
    config.evaluate.questions = 1000
    # Number of questions per batch.
    config.evaluate.batch = 50
    # Metric of an answer: a registered one (sparselora_jax/evaluation/metric.py), or package.module:Name.
    config.evaluate.metric = 'exact_match'
    # Decoding. The paper uses 5 beams, and length penalty -1 (short answers) or 1 (captions).
    # Number of beams; 1 is greedy decoding.
    config.evaluate.num_beams = 1
    # Maximum number of tokens in an answer.
    config.evaluate.max_new_tokens = 4
    # Minimum number of tokens, including those of the prompt.
    config.evaluate.min_length = 0
    # A beam's score is its log-probability / length ** length_penalty. A value above 0 favours long answers, below 0
    # short ones.
    config.evaluate.length_penalty = 1.0

    return config
