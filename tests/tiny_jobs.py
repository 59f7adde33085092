"""Recipes of the families, and what makes their jobs small."""

from configs import blip2_both, instructblip_both, llava_both, paligemma_both

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
