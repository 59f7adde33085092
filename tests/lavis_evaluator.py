"""The VQA evaluator of LAVIS, from its package. Only two files of it are read, and none of its requirements."""

import importlib.util
from pathlib import Path

import pytest

INSTALL = 'pip install --no-deps salesforce-lavis==1.0.2'


def _load(name):
    """Load a module of lavis/common/vqa_tools by its path: importing the package would need torch and 20 others."""
    package = importlib.util.find_spec('lavis')
    if package is None:
        pytest.skip(f'LAVIS, the reference, is not installed: {INSTALL}')
    file = Path(package.submodule_search_locations[0], 'common', 'vqa_tools', f'{name}.py')
    spec = importlib.util.spec_from_file_location(f'lavis_{name}', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluator():
    """LAVIS's `VQAEval` without data, for its `processPunctuation` and `processDigitArticle`."""
    return _load('vqa_eval').VQAEval()


def evaluated(pairs):
    """LAVIS's `VQAEval` after the evaluation of `answer_pairs.Pairs`; it rounds all values to two digits."""
    vqa = _load('vqa').VQA()
    annotations = [
        {
            'question_id': number,
            'image_id': number,
            'answer_type': pairs.answer_types[number],
            'question_type': pairs.question_types[number],
            # Equal dicts would be left out together: `answer_id` tells them apart, as in the official files.
            'answers': [{'answer': answer, 'answer_id': index} for index, answer in enumerate(answers)],
        }
        for number, answers in enumerate(pairs.references)
    ]
    vqa.dataset = {'annotations': annotations}
    vqa.questions = {'questions': []}
    vqa.createIndex()
    results = type(vqa)()
    results.qa = {number: {'answer': prediction} for number, prediction in enumerate(pairs.predictions)}
    tool = _load('vqa_eval').VQAEval(vqa, results, n=2)
    tool.evaluate()
    return tool
