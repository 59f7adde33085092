"""Forward, one LoRA step, greedy and beam decoding of whole models, against torch transformers.

    python benchmarks/forward.py [--families=blip2_opt,blip2_t5,llava]

Random models of the real classes, 130 to 240 million parameters, made by torch, saved as Hugging Face directories and
read by `sl.load_model`; batch 8, an image and 32 tokens each, fp32. The step is plain LoRA (rank 8, the language
model's linears) with AdamW on the cross-entropy of the last 16 tokens; torch's is `peft`. Decoding makes 32 tokens a
prompt, one beam or five, no end. Logits, losses and tokens of the two are compared before anything is timed. Then
every round times each library in turn, after a call that is not timed; a figure is the median of the rounds. `per
matmul` divides each library's time by what its own matmul rate (2048x2048x2048, same rounds) would take for the work.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
import optax
import torch
import torch.nn.functional as F
import transformers
from absl import app, flags
from timing import matmul_runs, seconds

import sparselora_jax as sl

FAMILIES = flags.DEFINE_list('families', ['blip2_opt', 'blip2_t5', 'llava'], 'which models')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'timed calls of each library')
BATCH, TEXT, PADS, ANSWERS, NEW, BEAMS, RANK, LR = 8, 32, 8, 16, 32, 5, 8, 1e-4
GOALS = {'forward': 1.0, 'LoRA step': 1.1, 'greedy': 1.5, 'beams': 1.5}  # torch's time over ours
EVA = {
    'hidden_size': 512,
    'intermediate_size': 2048,
    'num_hidden_layers': 8,
    'num_attention_heads': 8,
    'image_size': 112,
}
BRIDGE = {'hidden_size': 384, 'num_hidden_layers': 6, 'num_attention_heads': 6, 'intermediate_size': 1536}
OPT = {'model_type': 'opt', 'hidden_size': 768, 'ffn_dim': 3072, 'num_hidden_layers': 12, 'num_attention_heads': 12}
T5 = {
    'model_type': 't5',
    'd_model': 768,
    'd_kv': 64,
    'd_ff': 2048,
    'num_layers': 12,
    'num_decoder_layers': 12,
    'num_heads': 12,
}
LLAMA = {
    'model_type': 'llama',
    'hidden_size': 768,
    'intermediate_size': 2048,
    'num_hidden_layers': 12,
    'num_attention_heads': 12,
}
CLIP = {'model_type': 'clip_vision_model', 'hidden_size': 512, 'intermediate_size': 2048, 'num_hidden_layers': 8}


def torch_model(family: str):
    """A random torch model of that family."""
    end = {'eos_token_id': None, 'bos_token_id': 2, 'pad_token_id': 1}
    if family == 'llava':
        config = transformers.LlavaConfig(
            vision_config=CLIP | {'num_attention_heads': 8, 'image_size': 112, 'patch_size': 14, 'projection_dim': 512},
            text_config=LLAMA | {'vocab_size': 32064, 'tie_word_embeddings': False} | end,
            image_token_index=32000,
        )
        return transformers.LlavaForConditionalGeneration(config)
    text = {
        'blip2_opt': OPT | {'vocab_size': 50304, 'word_embed_proj_dim': 768, 'max_position_embeddings': 512} | end,
        'blip2_t5': T5
        | {'vocab_size': 32128, 'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}
        | {'decoder_start_token_id': 0, 'eos_token_id': None, 'pad_token_id': 0},
    }[family]
    config = transformers.Blip2Config(
        vision_config=EVA | {'patch_size': 14},
        qformer_config=BRIDGE | {'encoder_hidden_size': 512},
        text_config=text,
        num_query_tokens=32,
        image_token_index=50265 if family == 'blip2_opt' else 32100,
    )
    return transformers.Blip2ForConditionalGeneration(config)


def batch_of(model: sl.Model) -> dict[str, np.ndarray]:
    """Random images and texts, the first half of them left-padded."""
    rng = np.random.default_rng(0)
    vision = model.cfg.vision
    size, count = vision.image_size, model.cfg.qformer.queries if hasattr(model.cfg, 'qformer') else vision.grid**2
    text = rng.integers(100, 30000, (BATCH, TEXT))
    tokens = np.concatenate([np.full((BATCH, count), model.cfg.image_token), text], axis=1)
    tokens[: BATCH // 2] = np.concatenate([np.ones((BATCH // 2, PADS), int), tokens[: BATCH // 2, :-PADS]], axis=1)
    mask = np.ones(tokens.shape, np.int64)
    mask[: BATCH // 2, :PADS] = 0
    batch = {'pixel_values': rng.normal(size=(BATCH, 3, size, size)).astype(np.float32), 'attention_mask': mask}
    batch['input_ids'] = tokens
    if model.is_encoder_decoder:
        batch['decoder_input_ids'] = np.concatenate([np.zeros((BATCH, 1), int), text[:, : ANSWERS - 1]], axis=1)
    return batch


def decode(library: str, model, weights, batch: dict, beams: int):
    """A function that generates `NEW` tokens for each prompt."""
    batch = {name: value for name, value in batch.items() if name != 'decoder_input_ids'}
    if library == 'jax':
        return lambda: sl.generate(model, weights, batch, num_beams=beams, max_new_tokens=NEW)
    tensors = {name: torch.asarray(value) for name, value in batch.items()}
    knobs = {'num_beams': beams, 'max_new_tokens': NEW, 'min_new_tokens': NEW, 'do_sample': False}

    def run():
        with torch.no_grad():
            return model.generate(**tensors, **knobs).numpy()

    return run


def jax_runs(model: sl.Model, params: dict, batch: dict) -> dict:
    """What is timed, of this library."""
    logits = jax.jit(model.logits)
    lora = sl.init_lora(jax.random.key(0), params, [('language/(.*/)?blocks/.*', (RANK, 2 * RANK)), ('.*', None)])
    lora = jax.tree.map(lambda leaf: np.array(leaf), lora)
    tx = optax.adamw(LR)
    step = sl.make_train_step(lambda w, batch: model.answer_logits(w, batch), tx, kd=0.0, gradient='plain')
    targets = batch['decoder_input_ids' if model.is_encoder_decoder else 'input_ids'][:, -ANSWERS:]
    examples = batch | {'targets': targets.astype(np.int32), 'answer': np.ones(targets.shape, bool)}
    state = sl.init_state(jax.tree.map(jax.numpy.asarray, lora), tx)

    def train():
        nonlocal state
        state, metrics = step(state, sl.Frozen(params, None), examples)
        return float(metrics['loss'])

    return {
        'forward': lambda: np.asarray(logits(params, batch)),
        'LoRA step': train,
        'greedy': decode('jax', model, params, batch, 1),
        'beams': decode('jax', model, params, batch, BEAMS),
    }


def torch_runs(model, batch: dict, encoder_decoder: bool) -> dict:
    """The same of torch; `peft` wraps a copy for the step."""
    import copy

    import peft

    tensors = {name: torch.asarray(value) for name, value in batch.items()}
    names = ['q_proj', 'k_proj', 'v_proj', 'out_proj', 'o_proj', 'fc1', 'fc2', 'gate_proj', 'up_proj', 'down_proj']
    names += ['q', 'k', 'v', 'o', 'wi_0', 'wi_1', 'wo']
    targets = rf'.*language_model\..*\.({"|".join(names)})'
    knobs = {'r': RANK, 'lora_alpha': 2 * RANK, 'target_modules': targets, 'lora_dropout': 0.0}
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**knobs)).eval()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=LR, weight_decay=1e-4)
    labels = tensors['decoder_input_ids' if encoder_decoder else 'input_ids'][:, -ANSWERS:]

    def forward():
        with torch.no_grad():
            return model(**tensors).logits.numpy()

    def train():
        optimizer.zero_grad()
        loss = F.cross_entropy(adapted(**tensors).logits[:, -ANSWERS:].flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    decoding = {name: decode('torch', model, None, batch, beams) for name, beams in (('greedy', 1), ('beams', BEAMS))}
    return {'forward': forward, 'LoRA step': train} | decoding


def compare(ours: dict, theirs: dict, mask: np.ndarray | None) -> None:
    """Raises unless both libraries compute the same."""
    a, b = ours['forward'](), theirs['forward']()
    np.testing.assert_allclose(a if mask is None else a[mask], b if mask is None else b[mask], atol=1e-3)
    # The first step's: from the second on, the loss hangs on how A was drawn.
    np.testing.assert_allclose(ours['LoRA step'](), theirs['LoRA step'](), rtol=1e-3)
    for name in ('greedy', 'beams'):
        same = np.mean(ours[name]() == theirs[name]())
        print(f'{name}: {same:.1%} of the tokens are the same')


def measure(family: str) -> None:
    """Build, compares, times and prints one family."""
    torch.manual_seed(0)
    theirs = torch_model(family).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, params = sl.load_model(folder)
    batch = batch_of(model)
    count = sum(p.numel() for p in theirs.parameters())
    print(f'\n{family}: {count / 1e6:.0f} million parameters, batch {BATCH}')
    runs = {'jax': jax_runs(model, params, batch), 'torch': torch_runs(theirs, batch, model.is_encoder_decoder)}
    compare(runs['jax'], runs['torch'], None if model.is_encoder_decoder else batch['attention_mask'].astype(bool))
    matmuls = matmul_runs((2048, 2048, 2048))
    times, rates = {}, {}
    for _ in range(ROUNDS.value):
        for name in GOALS:
            for library, of_library in runs.items():
                of_library[name]()  # the call after another library's pays for the memory that one gave back
                times.setdefault((library, name), []).append(seconds(of_library[name]))
        for library, (run, flops) in matmuls.items():
            run()
            rates.setdefault(library, []).append(flops / seconds(run))
    rate = {library: float(np.median(values)) for library, values in rates.items()}
    print(f'matmul GFLOP/s: jax {rate["jax"] / 1e9:.0f}, torch {rate["torch"] / 1e9:.0f}')
    print('| what | ours, s (min to max) | torch, s (min to max) | torch / ours | per matmul | goal |')
    print('|---|---|---|---|---|---|')
    for name, goal in GOALS.items():
        middle = {library: float(np.median(times[library, name])) for library in runs}
        cells = [f'{middle[lib]:.2f} ({min(times[lib, name]):.2f} to {max(times[lib, name]):.2f})' for lib in runs]
        ratio = middle['torch'] / middle['jax']
        fair = ratio * rate['torch'] / rate['jax']
        verdict = 'holds' if ratio >= goal else 'missed'
        print(f'| {name} | {cells[0]} | {cells[1]} | {ratio:.2f} | {fair:.2f} | {goal}: {verdict} |', flush=True)


def main(argv):
    """Every family in turn."""
    del argv
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    print(f'{threads} cores, jax {jax.__version__}, torch {torch.__version__}')
    for family in FAMILIES.value:
        measure(family)


if __name__ == '__main__':
    app.run(main)
