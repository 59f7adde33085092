"""Train a small retrieval model on the stamps of Tux Paint, prune it at 2:4, and restore it under the masks.

    python benchmarks/stamps_retrieval.py DATA OUTPUT [--steps=300] [--restore_steps=150] [--batch=32] [--seed=0]

No package ships weights of BLIP-2's retrieval model. This one has its architecture and is small: the vision tower of
the embedded model, which knows shapes and colours, and a new Q-Former that reads the words of the training captions.
DATA is a folder that `stamps.py` has written. OUTPUT gets the Hugging Face directories `dense`, `pruned` and
`restored`, which `launch/evaluate.py --tasks=DATA/retrieval.jsonl` scores.

The losses are two of BLIP-2's three. Contrast: each picture of a batch has to find its caption, and the reverse.
Matching: a head tells a picture with its caption from a picture with the most similar wrong caption of the batch;
BLIP-2 draws the wrong caption at random, the similar ones more often. Restoration trains LoRA with the same losses; it
has no teacher.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from jaxtyping import Array
from stamps import CAPTION_QUESTION
from tokenizers import normalizers, pre_tokenizers

import sparselora_jax as sl
from sparselora_jax.checkpoints import embedded, hf_configs
from sparselora_jax.checkpoints.write_new import write_new
from sparselora_jax.data.folder import read_folder
from sparselora_jax.data.processing import Processor
from sparselora_jax.data.task_format import clean_caption
from sparselora_jax.models import blip2_retrieval, qformer
from sparselora_jax.models.init import init_params
from sparselora_jax.models.model import Generation, Model
from sparselora_jax.runtime.errors import DataError, SparseloraError
from sparselora_jax.runtime.progress import Progress

TEMPERATURE = 0.07  # of the contrast, as at the start of BLIP-2's training
RULES = [('(vision|qformer)/blocks/.*', '2:4'), ('.*', 'dense')]
RANK = sl.LoraSpec(rank=8, alpha=16.0)
CALIBRATION = 128  # pairs, as many as recipes draw


def read_pairs(data: Path) -> tuple[list[np.ndarray], list[str]]:
    """Return the pictures and captions of the training split.

    Raises:
      DataError: there are none; or a picture cannot be read.
    """
    records = read_folder(data).as_data_source('train')
    described = [record for record in records if record['question'] == CAPTION_QUESTION]
    if not described:
        raise DataError(f'{data}/data.jsonl: no caption to train on; write it by benchmarks/stamps.py')
    return [record['image'] for record in described], [clean_caption(record['answer']) for record in described]


def make_tokenizer(captions: list[str]) -> transformers.BertTokenizer:
    """Return a tokenizer like BERT's, which knows the words of the captions; it spells other words.

    The vocabulary is not learned: the trainers of tokenizers break ties at random, so two runs would give two models.
    """
    normalizer = normalizers.BertNormalizer()
    splitter = pre_tokenizers.BertPreTokenizer()
    words = set()
    for caption in captions:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
    letters = sorted(set(''.join(words)))
    insides = [f'##{letter}' for letter in letters]
    # Some words are a letter; each piece is there once.
    pieces = dict.fromkeys(['[PAD]', '[CLS]', '[SEP]', '[UNK]', *letters, *insides, *sorted(words)])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return transformers.BertTokenizer(vocab=vocabulary, mask_token=None)


def build(vocabulary: int, seed: int) -> tuple[Model, dict]:
    """Return the model: a new Q-Former on the vision tower of the embedded model."""
    bridge = embedded.load_config()
    config = blip2_retrieval.Blip2RetrievalConfig(
        vision=bridge.vision,
        qformer=qformer.QFormerConfig(
            queries=bridge.qformer.queries,
            width=192,
            pairs=1,
            heads=4,
            mlp_width=384,
            image_width=bridge.vision.width,
            vocab=vocabulary,
            max_positions=blip2_retrieval.TEXT_TOKENS,
        ),
        embedding_width=64,
    )
    model = Model(config, Generation(eos=(), pad=0))
    fresh = init_params(jax.random.key(seed), model.shapes())
    # The file holds half precision.
    parts, _ = sl.load_safetensors(embedded.BRIDGE)
    return model, fresh | {'vision': jax.tree.map(lambda leaf: leaf.astype(jnp.float32), parts['vision'])}


def hf_config(model: Model) -> transformers.Blip2Config:
    """Return transformers' config of the model."""
    cfg = model.cfg
    # The vision tower is the embedded model's. So is the language tower here, which retrieval models do not have.
    config = hf_configs.blip2_config(replace(embedded.load_config(), qformer=cfg.qformer), embedded.GENERATION)
    config.architectures = ['Blip2ForImageTextRetrieval']
    config.image_text_hidden_size = cfg.embedding_width
    config.qformer_config.use_qformer_text_input = True
    config.qformer_config.vocab_size = cfg.qformer.vocab
    config.qformer_config.max_position_embeddings = cfg.qformer.max_positions
    return config


def losses(params: dict, batch: dict, model: Model) -> tuple[Array, dict]:
    """Return the sum of both losses, and each of them."""
    family, cfg = model.family, model.cfg
    valid = batch['attention_mask'].astype(bool)
    tokens = batch['input_ids']
    features = family.image_features(params, cfg, batch['pixel_values'])
    images = family.image_embeddings(params, cfg, features)
    texts = family.text_embeddings(params, cfg, tokens, valid)
    similarity = jnp.einsum('iqd,td->itq', images, texts).max(axis=2)
    pairs = jnp.arange(len(tokens))
    logits = similarity / TEMPERATURE
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    contrast = (cross_entropy(logits, pairs).mean() + cross_entropy(logits.T, pairs).mean()) / 2
    # The most similar wrong caption of each picture.
    wrong = jnp.argmax(jnp.where(jnp.eye(len(tokens), dtype=bool), -jnp.inf, similarity), axis=1)
    right = family.match_logits(params, cfg, features, tokens, valid)
    other = family.match_logits(params, cfg, features, tokens[wrong], valid[wrong])
    labels = jnp.concatenate([jnp.ones_like(pairs), jnp.zeros_like(pairs)])
    match = cross_entropy(jnp.concatenate([right, other]), labels).mean()
    return contrast + match, {'contrast': contrast, 'match': match}


def train(
    name: str,
    loss: Callable[[dict, sl.Frozen | None, dict], tuple[Array, dict]],
    trained: dict,
    frozen: sl.Frozen | None,
    pairs: dict,
    *,
    steps: int,
    batch: int,
    seed: int,
) -> dict:
    """Return what is trained after so many steps; each batch is drawn anew, and half of its pictures are mirrored."""
    tx = sl.paper_optimizer(steps, peak=1e-3, warmup=20, start=0.0, end=1e-5, clip=1.0)
    step = sl.make_step(loss, tx)
    state = sl.init_state(trained, tx)
    rng = np.random.default_rng(seed)
    progress = Progress(name, steps)
    count = len(pairs['input_ids'])
    for done in range(1, steps + 1):
        rows = rng.permutation(count)[:batch]
        chosen = {key: array[rows] for key, array in pairs.items()}
        is_mirrored = rng.random(len(rows)) < 0.5
        mirrored = chosen['pixel_values'][..., ::-1]
        chosen['pixel_values'] = np.where(is_mirrored[:, None, None, None], mirrored, chosen['pixel_values'])
        state, metrics = step(state, frozen, chosen)
        progress(done, ', '.join(f'{key} {float(metrics[key]):.3f}' for key in ('contrast', 'match')))
    return state.trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('data', type=Path)
    parser.add_argument('output', type=Path)
    for name, default in (('steps', 300), ('restore_steps', 150), ('batch', 32), ('seed', 0)):
        parser.add_argument(f'--{name}', type=int, default=default)
    arguments = parser.parse_args()
    try:
        run(arguments)
    except SparseloraError as error:
        raise SystemExit(f'error: {error}') from None


def run(arguments: argparse.Namespace) -> None:
    """Train, prune and restore; write a directory after each."""
    pictures, captions = read_pairs(arguments.data)
    tokenizer = make_tokenizer(captions)
    model, params = build(len(tokenizer), arguments.seed)
    images = embedded.load_processor(embedded.load_config()).hf.image_processor
    hf = transformers.Blip2Processor(images, tokenizer, num_query_tokens=model.cfg.qformer.queries)
    processor = Processor(model.family.processor, hf, 0, tokenizer.sep_token_id, None, vocab=model.cfg.qformer.vocab)
    pairs = processor.read_images(pictures) | processor.read_texts(captions, blip2_retrieval.TEXT_TOKENS)
    fit = functools.partial(train, pairs=pairs, batch=arguments.batch, seed=arguments.seed)

    def write(name: str, weights: dict) -> None:
        write_new(arguments.output / name, hf_config(model), model, weights, processor=hf)
        print(f'{arguments.output / name}: written')

    dense = fit('train', lambda w, frozen, batch: losses(w, batch, model), params, None, steps=arguments.steps)
    write('dense', dense)
    calibration = {name: array[:CALIBRATION] for name, array in pairs.items()}
    pruned = sl.prune(model.hidden, dense, [calibration], RULES, method=sl.Wanda())
    write('pruned', pruned.params)
    lora = sl.init_lora(jax.random.key(arguments.seed), dense, [(RULES[0][0], RANK), ('.*', None)])

    def restore_loss(lora: dict, frozen: sl.Frozen, batch: dict) -> tuple[Array, dict]:
        return losses(sl.merge(frozen.params, frozen.masks, lora), batch, model)

    frozen = sl.Frozen(pruned.params, pruned.masks)
    lora = fit('restore', restore_loss, lora, frozen, steps=arguments.restore_steps)
    restored = sl.merge(pruned.params, pruned.masks, lora)
    sl.check_sparse(restored, pruned.masks)
    write('restored', restored)


if __name__ == '__main__':
    main()
