"""Recipes of the families, what makes their jobs small, and a check of a directory that a job has written."""

import numpy as np
import torch
import transformers
from tiny_models import CLASSES

from configs import blip2_both, instructblip_both, llava_both, paligemma_both
from sparselora_jax.data import processing

RECIPES = {
    'blip2-opt': (blip2_both, 'Question: {} Short answer:'),
    'blip2-t5': (blip2_both, 'Question: {} Short answer:'),
    'instructblip-t5': (instructblip_both, '{}'),
    'instructblip-llama': (instructblip_both, '{}'),
    'llava-default': (llava_both, 'USER: <image>\n{} ASSISTANT:'),
    'paligemma': (paligemma_both, '{}'),
}
SMALL = {
    'text.prompt_tokens': 40,
    'text.answer_tokens': 8,
    'prune.samples': 4,
    'prune.chunk': 2,
    'prune.block': 16,
    'evaluate.questions': 3,
    'evaluate.batch': 2,
    'evaluate.num_beams': 1,
    'evaluate.max_new_tokens': 7,
    'evaluate.length_penalty': 1.0,
    'restore.steps': 2,
    'restore.batch': 2,
    'restore.warmup': 1,
    'restore.checkpoint_every': 2,
}


def small_config(kind, folder, data, **fields):
    """The recipe of a family for a tiny directory."""
    recipe, prompt = RECIPES[kind]
    config = recipe.get_config(f'model={folder},data={data},pattern=2:4,hardware=cpu')
    config.update_from_flattened_dict(SMALL | {'text.prompt': prompt} | fields)
    return config


def small_batch(directory, text):
    """(a batch of one question, its targets, which of them are the answer's), by the directory's own processor."""
    processor = processing.load_processor(directory)
    prompt = text.write('is it red?')
    example = processor.example(np.zeros((20, 20, 3), np.uint8), prompt, 'teal', prompt_tokens=40, answer_tokens=8)
    targets, answer = example.pop('targets'), example.pop('answer')
    return {name: value[None] for name, value in example.items()}, targets, answer


def load_torch(directory):
    """Torch's model of a directory, all of whose weights it must hold."""
    kind = CLASSES[transformers.AutoConfig.from_pretrained(directory).model_type]
    theirs, info = kind.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return theirs.eval()


def torch_logits(theirs, model, batch, targets):
    """Torch's logits of the targets."""
    tensors = {name: torch.asarray(value) for name, value in batch.items()}
    tensors = {name: value if value.dtype == torch.float32 else value.long() for name, value in tensors.items()}
    if not model.is_encoder_decoder:  # transformers' own forward counts pads that lie behind the image
        mask = tensors['attention_mask']
        tensors['position_ids'] = torch.clip(mask.cumsum(1) - 1, 0)
    if 'opt' in type(model.cfg.language).__name__.lower():
        del tensors['position_ids']
    with torch.no_grad():
        return theirs(**tensors).logits.numpy()[:, -len(targets) :]


def check_torch_agrees(directory, source, model, weights, text):
    """Torch loads a directory that a job wrote, with the logits of our weights; it has the files of its source."""
    batch, targets, answer = small_batch(directory, text)
    want = torch_logits(load_torch(directory), model, batch, targets)
    got = model.answer_logits(weights, batch | {'targets': targets[None]})
    np.testing.assert_allclose(np.asarray(got)[:, answer], want[:, answer], atol=1e-4)
    files = {path.name for path in source.iterdir()} | {'text_format.json', 'README.md'}
    assert {path.name for path in directory.iterdir()} == files
