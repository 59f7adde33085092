"""Train the bridge of the embedded model, stage by stage. A rerun resumes and skips finished stages.

python launch/pretrain.py --config=configs/demo_pretrain.py --workdir=runs/pretrain
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cli
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import sparselora_jax as sl
from configs import demo_pretrain
from sparselora_jax import recipe
from sparselora_jax.checkpoints import embedded, gguf
from sparselora_jax.data import easy_vqa, pipeline
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.evaluation import vqa
from sparselora_jax.jobs import pretrain
from sparselora_jax.jobs.log import Log
from sparselora_jax.models import blip2, qformer, vit
from sparselora_jax.models.model import Model
from sparselora_jax.recipe import fields
from sparselora_jax.restoration.restore import paper_optimizer
from sparselora_jax.restoration.saved_state import Checkpoints
from sparselora_jax.restoration.train import fit, make_step
from sparselora_jax.runtime import files
from sparselora_jax.runtime.progress import Progress

CONFIG, WORKDIR = cli.define_config('configs/demo_pretrain.py', 'runs/pretrain', kind='pretraining')


# Legal values of the config's fields, by the last part of their names, which mean the same in every stage and tower.
LEGAL = {
    'seed': fields.SEED,
    'data_dir': fields.A_FOLDER,
    'shares': fields.SHARES,
    'lora_alpha': fields.POSITIVE,
    'peak': fields.POSITIVE,
    'clip': fields.POSITIVE,
    'weight_decay': fields.NOT_NEGATIVE,
    'warmup': fields.whole_number(0),
}
COUNTS = ('checkpoint_every', 'eval_questions', 'image_size', 'patch_size', 'width', 'depth', 'heads', 'mlp_width')
COUNTS += ('queries', 'pairs', 'steps', 'batch', 'lora_rank')
LEGAL |= dict.fromkeys(COUNTS, fields.COUNT)


def check_values(config: ConfigDict) -> None:
    """Check every field of the config.

    Raises:
      ConfigError: a field is missing, unknown or illegal.
    """
    expected = recipe.field_names(demo_pretrain.get_config())
    names = recipe.field_names(config)
    for name in names:
        if name not in expected:
            raise recipe.ConfigError(f'config has no field {name!r}; did you mean {recipe.nearest(name, expected)!r}?')
    for name in expected:
        if name not in names:
            raise recipe.ConfigError(f'config has no field {name!r}; begin with configs/demo_pretrain.py')
        value = recipe.value_of(config, name)
        last = name.rpartition('.')[2]
        # Other names are those of stages and towers.
        if not isinstance(value, ConfigDict):
            recipe.check_value(name, value, LEGAL[last])
    if len(config.shares) != 3 or sum(config.shares) == 0:
        raise recipe.ConfigError(f'shares {config.shares}: expected a share of each kind: yes/no, shape, colour')
    for tower in (config.vision, config.qformer):
        if tower.width % tower.heads:
            raise recipe.ConfigError(f'heads {tower.heads}: does not divide the width of its tower, {tower.width}')
    if config.vision.image_size % config.vision.patch_size:
        raise recipe.ConfigError(
            f'vision.patch_size {config.vision.patch_size}: does not divide the image, {config.vision.image_size}'
        )


class Pretraining:
    """One run: its model, its data and the folder that its stages write to."""

    def __init__(self, config: ConfigDict, workdir: Path, language_cfg: Any):
        """Set up the run; no weights are made.

        Args:
          config: see `configs/demo_pretrain.py`.
          workdir: where results, logs and checkpoints go.
          language_cfg: config of the language model.
        """
        self.config = config
        self.workdir = workdir
        self.log = Log(workdir)
        self.cfg = blip2.Blip2Config(
            vision=vit.ViTConfig(**config.vision),
            qformer=qformer.QFormerConfig(image_width=config.vision.width, **config.qformer),
            language=language_cfg,
        )
        self.processor = embedded.load_processor(self.cfg)
        self.text = TextFormat()
        self.dataset = easy_vqa.load(config.data_dir)
        self.image_texts = easy_vqa.read_texts(easy_vqa.prepare(config.data_dir), 'train')

    def images(self, *, batch: int, words: Callable[[tuple[int, int]], np.ndarray] | None = None) -> Any:
        """Return batches of images with their facts, randomly flipped and rotated.

        Neither change affects the shape or the colour.

        Args:
          batch: number of images in a batch.
          words: maps a colour and a shape to the words of a caption. If it is given, images are left out if no question
            reveals their colour or their shape.
        """
        facts = easy_vqa.image_facts(self.image_texts)
        # An image has several questions, and its first record represents it. The order is reversed so that the first
        # record overwrites later ones.
        first = {image_id: index for index, (_, _, image_id) in reversed(list(enumerate(self.image_texts)))}
        usable = [first[image_id] for image_id, fact in sorted(facts.items()) if words is None or min(fact) >= 0]

        def transform(record: dict[str, Any]) -> dict[str, np.ndarray]:
            fact = facts[int(record['image_id'])]
            # The processor requires a text with each image; the text is not used.
            pixels = self.processor.prompt([record['image']], ['-'])['pixel_values'][0]
            example = {'pixel_values': pixels, 'facts': np.asarray(fact, np.int32)}
            return example if words is None else example | {'words': words(fact)}

        def turn(example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
            image = np.rot90(example['pixel_values'], rng.integers(4), axes=(1, 2))
            direction = rng.choice([-1, 1])
            return example | {'pixel_values': np.ascontiguousarray(image[:, :, ::direction])}

        source = self.dataset.train.source
        return pipeline.batches(
            source, transform, batch=batch, seed=self.config.seed, groups=[usable], shares=(1,), augment=turn
        )

    def questions(self, *, batch: int, seed: int) -> Any:
        """Return batches of questions and answers, with the config's shares of each kind."""
        return pipeline.batches(
            self.dataset.train.source,
            pipeline.vqa_transform(self.processor, self.text),
            batch=batch,
            seed=seed,
            groups=pipeline.groups_by_kind(self.dataset.train, self.dataset),
            shares=self.config.shares,
        )

    def train(self, name: str, loss: Callable[..., Any], trained: dict, frozen: dict | None, batches: Any) -> dict:
        """Run one stage, from its last checkpoint if there is one.

        Args:
          name: name of the stage; its schedule is the config's field of this name.
          loss: a loss of `jobs.pretrain`.
          trained: params to train.
          frozen: params that the loss reads but the stage does not train.
          batches: see `restoration.train.fit`.

        Returns:
          `trained` after the last step.
        """
        schedule = self.config[name]
        # AdamW with warm-up and cosine. Gradients are clipped: their norm is 20 to 80 at the beginning.
        tx = paper_optimizer(
            schedule.steps,
            peak=schedule.peak,
            warmup=schedule.warmup,
            start=0.0,
            end=0.01 * schedule.peak,
            weight_decay=schedule.weight_decay,
            clip=schedule.clip,
        )
        # A finished stage is restored from its last checkpoint, and `fit` has nothing left to do.
        checkpoints = Checkpoints(self.workdir / name)
        done = checkpoints.steps()
        progress = Progress(name, schedule.steps, first=done[-1] if done else 0)

        def note(step: int, metrics: dict[str, float]) -> None:
            self.log.scalars(name, step, metrics)
            progress(step, ' '.join(f'{key} {value:.3f}' for key, value in metrics.items()))

        state = fit(
            make_step(functools.partial(loss, cfg=self.cfg), tx),
            sl.init_state(trained, tx),
            frozen,
            batches,
            steps=schedule.steps,
            checkpoints=checkpoints,
            every=self.config.checkpoint_every,
            log=note,
        )
        return state.trained

    def score(self, name: str, params: dict, *, shuffle_images: bool = False) -> None:
        """Print the accuracy on the test questions, and write it to `NAME.json`.

        Args:
          name: name of the model.
          params: weights of the model.
          shuffle_images: pair each question with the image of another one.
        """
        # If an earlier run has written the score, it is printed and not computed again.
        file = self.workdir / f'{name}.json'
        if not file.exists():
            indices = vqa.sample(self.config.eval_questions, len(self.dataset.test.source), seed=self.config.seed)
            answers = vqa.evaluate(
                Model(self.cfg, embedded.GENERATION),
                params,
                self.processor,
                self.text,
                self.dataset.test,
                indices,
                batch=min(50, len(indices)),
                shuffle_images=shuffle_images,
                progress=Progress(f'evaluate {name}', len(indices)),
                max_new_tokens=4,
            )
            files.write_text(file, json.dumps(answers.accuracy(self.dataset.kind_of), indent=1))
        print(name, file.read_text())


def subset(params: dict, names: Sequence[str]) -> dict:
    """Return the named parts of a params tree."""
    return {name: params[name] for name in names}


def main(argv: list[str]) -> None:
    """Run the stages in order, then write the bridge and score the model."""
    del argv
    config = CONFIG.value
    workdir = Path(WORKDIR.value)
    check_values(config)
    recipe.claim(workdir, config)
    key = jax.random.key(config.seed)
    language_cfg, language = gguf.load_llama(embedded.language_model_file())
    run = Pretraining(config, workdir, language_cfg)
    params = pretrain.init(key, run.cfg)

    trained = run.train(
        'facts',
        pretrain.facts_loss,
        trained=subset(params, ('vision', 'facts')),
        frozen=None,
        batches=run.images(batch=config.facts.batch),
    )
    # From here on the vision encoder is frozen; the heads that named colour and shape are dropped.
    frozen = {'vision': trained['vision'], 'language': language}
    words = functools.partial(pretrain.caption_words, run.processor.hf.tokenizer, queries=run.cfg.qformer.queries)
    bridge = run.train(
        'words',
        pretrain.words_loss,
        trained=subset(params, ('qformer', 'projection')),
        frozen=frozen,
        batches=run.images(batch=config.words.batch, words=words),
    )
    bridge = run.train(
        'answers',
        pretrain.answers_loss,
        trained=bridge,
        frozen=frozen,
        batches=run.questions(batch=config.answers.batch, seed=config.seed),
    )
    run.score('frozen', frozen | bridge)

    # LoRA is added to all blocks of the language model, and to no other kernel.
    rules = [('language/blocks/.*', sl.LoraSpec(config.lora_rank, config.lora_alpha)), ('.*', None)]
    lora = sl.init_lora(jax.random.fold_in(key, 1), {'language': language}, rules)
    trained = run.train(
        'lora',
        pretrain.answers_loss,
        trained=bridge | {'lora': lora},
        frozen=frozen,
        # The seed differs from that of the previous stage, so the same questions come in a different order.
        batches=run.questions(batch=config.lora.batch, seed=config.seed + 10),
    )
    # The language model comes from its own package, so the file holds only the rest, in half precision.
    result = trained | {'vision': frozen['vision']}
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), result)
    file = workdir / embedded.BRIDGE.name
    sl.save_safetensors(file, half, metadata={'config': embedded.to_json(run.cfg)})
    print(f'{file}: {file.stat().st_size / 1e6:.1f} MB')
    # Score the model as users load it: in half precision, with LoRA merged.
    _, weights = embedded.load(file)
    run.score('trained', weights)
    run.score('shuffled', weights, shuffle_images=True)


if __name__ == '__main__':
    cli.run(main)
