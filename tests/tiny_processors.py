"""Small Hugging Face directories of every family, made offline: tokenizers, image settings, configs."""

import json

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ['Question: what is the colour of the cat? Short answer: teal', 'USER: is it a red circle? ASSISTANT: yes'] * 9
SIDE, PATCH = 28, 14
RNG = np.random.default_rng(0)
PICTURES = [
    Image.fromarray(RNG.integers(0, 256, (40, 61, 3), np.uint8)),
    Image.fromarray(RNG.integers(0, 256, (70, 31), np.uint8)),
    Image.fromarray(RNG.integers(0, 256, (30, 30, 4), np.uint8)),
]
TEXTS = ['Question: what is the colour of the cat? Short answer:', 'is it red?', 'a cat of the colour teal']
LAYOUT = {'prompt_tokens': 40, 'answer_tokens': 8}


def bpe(bos, eos, pad, *, image, template=None, spaces='bytes'):
    """A tokenizer like OPT's (`bytes`: a space belongs to its word) or LLaMA's (`first`: one is put in front)."""
    tokenizer = Tokenizer(models.BPE(unk_token='<unk>'))
    if spaces == 'bytes':
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=spaces)
        alphabet = list('\n')
    special = list(dict.fromkeys([pad, bos, eos, '<unk>', *(['<image>'] if image else [])]))
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in (bos, eos)]
    if template:
        pair = template + ' $B'
        tokenizer.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=ids)
    tokens = {'bos_token': bos, 'eos_token': eos, 'pad_token': pad, 'unk_token': '<unk>'}
    names = ['input_ids', 'attention_mask']
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **tokens)


def opt_tokenizer():
    return bpe('</s>', '</s>', '<pad>', image=False, template='</s> $A')


def t5_tokenizer():
    return bpe('<s>', '</s>', '<pad>', image=False, template='$A </s>', spaces='always')


def llama_tokenizer(image=True):
    return bpe('<s>', '</s>', '<pad>', image=image, template='<s> $A', spaces='first')


def bert_tokenizer():
    words = ['[PAD]', '[CLS]', '[SEP]', '[UNK]', *sorted({w for line in CORPUS for w in line.lower().split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token='[UNK]'))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    ids = [('[CLS]', 1), ('[SEP]', 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]', special_tokens=ids)
    tokens = {'cls_token': '[CLS]', 'sep_token': '[SEP]', 'pad_token': '[PAD]', 'unk_token': '[UNK]'}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def square():
    return {'height': SIDE, 'width': SIDE}


def make(name, folder):
    """A directory of the kind, as transformers saves it; the processor that it holds."""
    vision = {'image_size': SIDE, 'patch_size': PATCH}
    if name.startswith(('blip2', 'instructblip')):
        instruct, language = name.startswith('instructblip'), name.rsplit('-')[-1]
        blip = transformers.BlipImageProcessorPil(size=square())
        tokenizer = {'opt': opt_tokenizer, 't5': t5_tokenizer, 'llama': lambda: llama_tokenizer(False)}[language]()
        if instruct:
            hf = transformers.InstructBlipProcessor(blip, tokenizer, bert_tokenizer(), num_query_tokens=5)
        else:
            hf = transformers.Blip2Processor(blip, tokenizer, num_query_tokens=5)
        kind = transformers.InstructBlipConfig if instruct else transformers.Blip2Config
        text = {'model_type': language, 'eos_token_id': tokenizer.eos_token_id}
        text |= {'decoder_start_token_id': 0} if language == 't5' else {}
        image = tokenizer.convert_tokens_to_ids('<image>')
        config = kind(vision_config=vision, text_config=text, num_query_tokens=5, image_token_index=image)
    elif name.startswith('llava'):
        clip = transformers.CLIPImageProcessorPil(size={'shortest_edge': SIDE}, crop_size=square())
        tokenizer, strategy = llama_tokenizer(), name.rsplit('-')[-1]
        settings = {'patch_size': PATCH, 'num_additional_image_tokens': 1, 'vision_feature_select_strategy': strategy}
        hf = transformers.LlavaProcessor(clip, tokenizer, **settings)
        text = {'model_type': 'llama', 'eos_token_id': tokenizer.eos_token_id}
        vision |= {'model_type': 'clip_vision_model'}
        image = {'image_token_index': hf.image_token_id, 'vision_feature_select_strategy': strategy}
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, **image)
    else:
        siglip = transformers.SiglipImageProcessorPil(size=square(), image_seq_length=4)
        tokenizer = bpe('<bos>', '<eos>', '<pad>', image=False, spaces='never')
        hf = transformers.PaliGemmaProcessor(siglip, tokenizer)
        text = {'model_type': 'gemma', 'eos_token_id': tokenizer.eos_token_id}
        vision |= {'model_type': 'siglip_vision_model'}
        config = transformers.PaliGemmaConfig(
            vision_config=vision, text_config=text, image_token_index=hf.image_token_id
        )
    hf.save_pretrained(folder)
    config.save_pretrained(folder)
    return hf


KINDS = ['blip2-opt', 'blip2-t5', 'instructblip-llama', 'instructblip-t5', 'llava-default', 'llava-full', 'paligemma']


def prompts(kind):
    return [f'USER: <image>\n{text} ASSISTANT:' for text in TEXTS] if kind.startswith('llava') else TEXTS


def edit(file, change):
    settings = json.loads(file.read_text())
    change(settings)
    file.write_text(json.dumps(settings))
