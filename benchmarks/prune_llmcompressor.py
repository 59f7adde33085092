"""llm-compressor's side of `benchmarks/prune.py`, which starts it in an environment of its own.

    python3.11 -m venv llmc && llmc/bin/pip install -r benchmarks/requirements-llmcompressor.txt

Prunes a Hugging Face directory with `oneshot` and its sequential pipeline, in fp32, `lm_head` left out; writes the
pruned model, and the figures as JSON. The clock runs from the model and its tokens in memory to pruned weights in
memory.
"""

import argparse
import importlib.metadata
import json
import time
from pathlib import Path

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from memory import PeakMemory
from transformers import AutoModelForCausalLM


def main() -> None:
    """Prune once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', required=True, help='a Hugging Face directory')
    parser.add_argument('--tokens', required=True, help='[sequences, length] int32, a .npy file')
    parser.add_argument('--method', required=True, choices=('wanda', 'sparsegpt'))
    parser.add_argument('--pattern', required=True, help='2:4, or a sparsity')
    parser.add_argument('--block', type=int, required=True)
    parser.add_argument('--damp', type=float, required=True)
    parser.add_argument('--batch', type=int, required=True, help='sequences a forward')
    parser.add_argument('--threads', type=int, required=True)
    parser.add_argument('--out', type=Path, required=True)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    structured = ':' in arguments.pattern
    asked = {
        'sparsity': 0.5 if structured else float(arguments.pattern),
        'mask_structure': arguments.pattern if structured else '0:0',
        'ignore': ['re:.*lm_head'],
    }
    if arguments.method == 'wanda':
        modifier = WandaPruningModifier(**asked)
    else:
        modifier = SparseGPTModifier(block_size=arguments.block, dampening_frac=arguments.damp, **asked)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokens = torch.from_numpy(np.load(arguments.tokens)).long()
    batches = [{'input_ids': part, 'attention_mask': torch.ones_like(part)} for part in tokens.split(arguments.batch)]
    dataset = torch.utils.data.DataLoader(batches, batch_size=None)

    memory, started, cpu = PeakMemory(), time.monotonic(), time.process_time()
    oneshot(model=model, dataset=dataset, recipe=[modifier], pipeline='sequential')
    figures = {'seconds': time.monotonic() - started, 'cpu': time.process_time() - cpu}
    figures |= {'peak': memory.peak(), 'loaded': memory.loaded}
    model.save_pretrained(arguments.out, save_compressed=False)
    versions = {name: importlib.metadata.version(name) for name in ('llmcompressor', 'torch', 'transformers')}
    (arguments.out / 'figures.json').write_text(json.dumps(figures | {'versions': versions}))


if __name__ == '__main__':
    main()
