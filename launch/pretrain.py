"""Makes the bridge of the embedded model, stage by stage; each stage resumes, and is skipped once it is done.

python launch/pretrain.py --config=configs/demo_pretrain.py --workdir=runs/pretrain
"""

import functools
import json
from pathlib import Path

import cli
import jax
import jax.numpy as jnp
import numpy as np

import sparselora_jax as sl
from sparselora_jax import recipe
from sparselora_jax.checkpoints import embedded, gguf
from sparselora_jax.data import easy_vqa, pipeline
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.evaluation import vqa
from sparselora_jax.jobs import pretrain
from sparselora_jax.models import blip2, qformer, vit
from sparselora_jax.models.model import Model
from sparselora_jax.restoration.checkpoint import Checkpoints
from sparselora_jax.restoration.train import fit, make_step
from sparselora_jax.runtime import files
from sparselora_jax.runtime.progress import Log, Progress

CONFIG, WORKDIR = cli.define_config('configs/demo_pretrain.py', 'runs/pretrain')


def image_batches(source, texts, processor, *, batch: int, seed: int, words=None):
    """Images with their facts (and caption words), flipped and turned at random: neither changes shape or colour."""
    facts = easy_vqa.image_facts(texts)
    first = {image_id: index for index, (_, _, image_id) in reversed(list(enumerate(texts)))}
    told = [first[i] for i, fact in sorted(facts.items()) if words is None or min(fact) >= 0]

    def transform(record):
        fact = facts[int(record['image_id'])]
        example = {
            'pixel_values': processor.prompt([record['image']], ['-'])['pixel_values'][0],
            'facts': np.asarray(fact, np.int32),
        }
        return example if words is None else example | {'words': words(fact)}

    def turn(example, rng):
        image = np.rot90(example['pixel_values'], rng.integers(4), axes=(1, 2))
        return example | {'pixel_values': np.ascontiguousarray(image[:, :, :: rng.choice([-1, 1])])}

    return pipeline.batches(source, transform, batch=batch, seed=seed, groups=[told], shares=(1,), augment=turn)


def main(argv):
    """Runs the stages in order."""
    del argv
    config, workdir = CONFIG.value, Path(WORKDIR.value)
    recipe.claim(workdir, config)
    log, key = Log(workdir), jax.random.key(config.seed)
    path = embedded.language_model_file()
    language_cfg, language = gguf.load_llama(path)
    cfg = blip2.Blip2Config(
        vision=vit.ViTConfig(**config.vision),
        qformer=qformer.QFormerConfig(image_width=config.vision.width, **config.qformer),
        language=language_cfg,
    )
    model, processor = Model(cfg, embedded.GENERATION), embedded.load_processor(cfg)
    tokenizer = processor.hf.tokenizer
    dataset = easy_vqa.load(config.data_dir)
    train = dataset.train.source
    texts = easy_vqa.read_texts(easy_vqa.prepare(config.data_dir), 'train')
    text = TextFormat()
    params = pretrain.init(key, cfg)

    def questions(batch, seed):
        groups = pipeline.groups_by_kind(dataset.train, dataset)
        transform = pipeline.vqa_transform(processor, text)
        return pipeline.batches(train, transform, batch=batch, seed=seed, groups=groups, shares=config.shares)

    def stage(name, loss, trained, frozen, batches):
        """Trains `trained`, and returns it as it is after the last step."""
        knobs = config[name].to_dict()
        steps = knobs.pop('steps')
        knobs.pop('batch')
        tx = pretrain.optimizer(steps=steps, **knobs)
        checkpoints = Checkpoints(workdir / name)
        progress = Progress(name, steps, first=(checkpoints.steps() or [0])[-1])

        def note(step, metrics):
            log.scalars(name, step, metrics)
            progress(step, ' '.join(f'{key} {value:.3f}' for key, value in metrics.items()))

        step = make_step(functools.partial(loss, cfg=cfg), tx)
        state = sl.init_state(trained, tx)
        state = fit(
            step, state, frozen, batches, steps=steps, checkpoints=checkpoints, every=config.checkpoint_every, log=note
        )
        return state.trained

    def scores(name, weights, **options):
        """Accuracy on the test questions, kept in `<name>.json`."""
        file = workdir / f'{name}.json'
        if not file.exists():
            indices = vqa.sample(config.eval_questions, len(dataset.test.source), seed=config.seed)
            options |= {
                'max_new_tokens': 4,
                'batch': min(50, len(indices)),
                'progress': Progress(f'evaluate {name}', len(indices)),
            }
            answers = vqa.evaluate(model, weights, processor, text, dataset.test, indices, **options)
            files.write_text(file, json.dumps(answers.accuracy(dataset.kind_of), indent=1))
        print(name, file.read_text())

    trained = stage(
        'facts',
        pretrain.facts_loss,
        {name: params[name] for name in ('vision', 'facts')},
        None,
        image_batches(train, texts, processor, batch=config.facts.batch, seed=config.seed),
    )
    frozen = {'vision': trained['vision'], 'language': language}
    words = functools.partial(pretrain.caption_words, tokenizer, queries=cfg.qformer.queries)
    bridge = {name: params[name] for name in ('qformer', 'projection')}
    bridge = stage(
        'words',
        pretrain.words_loss,
        bridge,
        frozen,
        image_batches(train, texts, processor, batch=config.words.batch, seed=config.seed, words=words),
    )
    bridge = stage('answers', pretrain.answers_loss, bridge, frozen, questions(config.answers.batch, config.seed))
    scores('frozen', frozen | bridge)
    rules = [('language/blocks/.*', sl.LoraSpec(config.lora_rank, config.lora_alpha)), ('.*', None)]
    lora = sl.init_lora(jax.random.fold_in(key, 1), {'language': language}, rules)
    trained = stage(
        'lora', pretrain.answers_loss, bridge | {'lora': lora}, frozen, questions(config.lora.batch, config.seed + 10)
    )
    result = trained | {'vision': frozen['vision']}
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), result)
    file = workdir / embedded.BRIDGE.name
    sl.save_safetensors(file, half, metadata={'config': embedded.to_json(cfg)})
    print(f'{file}: {file.stat().st_size / 1e6:.1f} MB')
    _, weights = embedded.load(file)
    scores('trained', weights)
    scores('shuffled', weights, shuffle_images=True)


if __name__ == '__main__':
    cli.run(main)
