"""Metrics of public benchmarks, as pure functions of generated answers and references.

- `vqa_accuracy`: VQAv2, OK-VQA, TextVQA, VizWiz
- `gqa`: GQA
- `science_qa`: ScienceQA, multiple choice
- `pope`: POPE, questions about objects that may not be in the image
- `captions`: COCO, NoCaps, Flickr30k; of `cider`, `bleu`, `rouge` and, with Java, `meteor`, on `ptb_tokenizer`'s words
- `retrieval`: recall between images and texts
- `scored`: what these functions return; `answer_text`, `lemmas`: how answers are normalised
"""
