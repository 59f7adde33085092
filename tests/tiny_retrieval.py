"""Small Hugging Face directories of BLIP-2's retrieval model, as torch's transformers saves them."""

import json

import numpy as np
import torch
import transformers
from tiny_models import QFORMER, VISION
from tiny_processors import PATCH, SIDE, bert_tokenizer

QUERIES, EMBEDDING = 5, 12
READS_TEXT = {'encoder_hidden_size': 32, 'max_position_embeddings': 40, 'use_qformer_text_input': True}
WORDS = ('what', 'is', 'the', 'colour', 'of', 'a', 'it', 'red', 'yes', 'teal')  # that the tokenizer knows


def config(vocab, image_size=SIDE, **changes):
    """The config of a model that reads such tokens."""
    return transformers.Blip2Config(
        vision_config=VISION | {'image_size': image_size, 'patch_size': PATCH},
        qformer_config=QFORMER | READS_TEXT | {'vocab_size': vocab},
        num_query_tokens=QUERIES,
        image_text_hidden_size=EMBEDDING,
        **changes,
    )


def build(hf):
    """Torch's model, all its parameters random."""
    torch.manual_seed(0)
    model = transformers.Blip2ForImageTextRetrieval(hf).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(folder, image_size=SIDE):
    """Write a directory with weights and processor; return torch's model."""
    tokenizer = bert_tokenizer()
    size = {'height': image_size, 'width': image_size}
    images = transformers.BlipImageProcessorPil(size=size)
    transformers.Blip2Processor(images, tokenizer, num_query_tokens=QUERIES).save_pretrained(folder)
    # The processor adds an image token, which the model has no row for.
    model = build(config(len(bert_tokenizer()), image_size))
    model.save_pretrained(folder)
    return model


def write_captions(file):
    """Give the images of a file in Karpathy's form captions that the model tells apart: no two scores are equal."""
    data = json.loads(file.read_text())
    rng = np.random.default_rng(0)
    for image in data['images']:
        for sentence in image['sentences']:
            sentence['raw'] = ' '.join(rng.choice(WORDS, rng.integers(3, 12)))
    file.write_text(json.dumps(data))
