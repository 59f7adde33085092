"""Metrics of public benchmarks, as pure functions of generated answers and references.

- `vqa_accuracy`: VQAv2, OK-VQA, TextVQA, VizWiz
- `gqa`: GQA
- `science_qa`: ScienceQA, multiple choice
- `pope`: POPE, questions about objects that may not be in the image
- `scored`: what these functions return; `answer_text`, `lemmas`: how answers are normalised
"""
