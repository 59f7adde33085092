"""The bridge of the embedded model: a small vision encoder and Q-Former on SmolLM2-135M-Instruct, trained on easy-VQA.

python launch/pretrain.py --config=configs/demo_pretrain.py --workdir=runs/pretrain

Under an hour on 2 CPU cores; 99.4 % of 1,000 test questions (assets/README.md has the log and the scores).
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; see `sparselora_jax/pretrain.py` for its stages."""
    del arg
    config = ConfigDict()
    config.seed = 42
    config.data_dir = 'runs/data'
    config.checkpoint_every = 50
    config.eval_questions = 1000
    config.vision = ConfigDict(
        {'image_size': 64, 'patch_size': 8, 'width': 192, 'depth': 6, 'heads': 3, 'mlp_width': 768},
    )
    config.qformer = ConfigDict({'queries': 8, 'width': 256, 'pairs': 2, 'heads': 4, 'mlp_width': 512})
    config.facts = ConfigDict(
        {'steps': 1500, 'batch': 64, 'peak': 1e-3, 'warmup': 100, 'clip': 1.0, 'weight_decay': 0.05}
    )
    config.words = ConfigDict(
        {'steps': 600, 'batch': 32, 'peak': 1e-3, 'warmup': 50, 'clip': 1.0, 'weight_decay': 0.01}
    )
    # The language model is frozen here; a batch is half yes/no, a quarter shape, a quarter colour.
    config.answers = ConfigDict(
        {'steps': 150, 'batch': 32, 'peak': 2e-4, 'warmup': 20, 'clip': 1.0, 'weight_decay': 0.01}
    )
    # Then it is trained too, by LoRA: frozen it does not reach 95 % (negated questions).
    config.lora = ConfigDict({'steps': 400, 'batch': 32, 'peak': 5e-4, 'warmup': 20, 'clip': 1.0, 'weight_decay': 0.0})
    config.lora_rank = 4
    config.lora_alpha = 8.0
    config.shares = (2, 1, 1)
    return config
