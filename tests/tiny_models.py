"""Small Hugging Face directories of every family, weights included, as torch's transformers saves them; and data."""

import json

import numpy as np
import torch
import transformers
from PIL import Image
from tiny_processors import make

TEXT = {
    'opt': {
        'hidden_size': 32,
        'ffn_dim': 64,
        'num_hidden_layers': 2,
        'num_attention_heads': 4,
        'word_embed_proj_dim': 32,
    },
    't5': {'d_model': 32, 'd_kv': 8, 'd_ff': 64, 'num_layers': 2, 'num_decoder_layers': 2, 'num_heads': 4},
    'llama': {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4},
    'gemma': {
        'hidden_size': 32,
        'intermediate_size': 64,
        'num_hidden_layers': 2,
        'num_attention_heads': 4,
        'head_dim': 8,
    },
}
MORE = {
    'opt': {'max_position_embeddings': 128},
    't5': {'feed_forward_proj': 'gated-gelu'},
    'llama': {'num_key_value_heads': 4, 'tie_word_embeddings': False},
    'gemma': {'num_key_value_heads': 1},
}
VISION = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4}
QFORMER = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4}
CLASSES = {
    'blip-2': transformers.Blip2ForConditionalGeneration,
    'instructblip': transformers.InstructBlipForConditionalGeneration,
    'llava': transformers.LlavaForConditionalGeneration,
    'paligemma': transformers.PaliGemmaForConditionalGeneration,
}


def save(kind, folder, **options):
    """Writes a directory of that kind (see `tiny_processors`); returns torch's model. `options`: of saving."""
    processor = make(kind, folder)
    whole = transformers.AutoConfig.from_pretrained(folder).to_dict()
    text = whole['text_config']['model_type']
    # Room for the image token, which lies behind the tokenizer's own, and sizes that 2 and 4 divide.
    vocab = -(-max(len(processor.tokenizer), 1 + whole.get('image_token_id', whole.get('image_token_index'))) // 8) * 8
    whole['text_config'] |= TEXT[text] | MORE[text] | {'vocab_size': vocab}
    whole['text_config'] |= {
        f'{name}_token_id': getattr(processor.tokenizer, f'{name}_token_id') for name in ('bos', 'pad')
    }
    whole['vision_config'] |= VISION
    if 'qformer_config' in whole:
        whole['qformer_config'] |= QFORMER | {'encoder_hidden_size': 32}
        if hasattr(processor, 'qformer_tokenizer'):
            whole['qformer_config']['vocab_size'] = len(processor.qformer_tokenizer)
    if kind == 'paligemma':
        whole['projection_dim'] = whole['vision_config']['projection_dim'] = 32
    config = type(transformers.AutoConfig.from_pretrained(folder))(**whole)
    torch.manual_seed(0)
    model = CLASSES[config.model_type](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, **options)
    return model


def save_data(folder, count):
    """Writes a folder of so many images with a question each, a third of them for tests."""
    rng, lines = np.random.default_rng(0), []
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / f'{index}.png')
        split, answer = ('test', 'train', 'train')[index % 3], ('yes', 'teal')[index % 2]
        lines.append({'image': f'{index}.png', 'prompt': 'is it red?', 'answer': answer, 'split': split})
    (folder / 'data.jsonl').write_text('\n'.join(json.dumps(line) for line in lines))
