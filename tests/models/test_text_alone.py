"""A text without an image: the language model computes what torch's language model computes for the text alone."""

import jax
import numpy as np
import pytest
import torch
from tiny_models import save

from sparselora_jax.checkpoints.load import load_model
from sparselora_jax.data import processing

PROMPTS = {'blip2-opt': '{}', 'llava-default': '<image>\n{}'}


@pytest.mark.slow
@pytest.mark.parametrize('kind', list(PROMPTS))
def test_the_logits_of_a_text_are_those_of_the_text_alone(kind, tmp_path):
    theirs = save(kind, tmp_path)
    model, params = load_model(tmp_path)
    processor = processing.load_processor(tmp_path)
    sizes = {'prompt_tokens': 20, 'answer_tokens': 12}
    example = processor.example(None, PROMPTS[kind].format('a red circle'), 'is on the left', **sizes)
    batch = {name: value[None] for name, value in example.items()}
    is_image = np.asarray(model.is_image(batch))
    assert is_image.sum() == processor.image_tokens
    assert not (batch['attention_mask'] * is_image).any()
    got = np.asarray(model.answer_logits(params, batch))[0]
    # The pixels do not matter.
    noise = jax.random.normal(jax.random.key(0), batch['pixel_values'].shape)
    np.testing.assert_array_equal(np.asarray(model.answer_logits(params, batch | {'pixel_values': noise}))[0], got)
    words = torch.asarray(batch['input_ids'][0][batch['attention_mask'][0] == 1]).long()[None]
    language = theirs.language_model if kind == 'blip2-opt' else theirs
    with torch.no_grad():
        want = language(input_ids=words).logits[0].numpy()
    count = int(example['answer'].sum())
    np.testing.assert_allclose(got[:count], want[-count:], atol=1e-4)
