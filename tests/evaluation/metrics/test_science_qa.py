"""ScienceQA's letters against cases computed by hand, and the accuracies of all questions and of those with images."""

import pytest

from sparselora_jax.evaluation.metrics.science_qa import answer_letter, science_qa_accuracy
from sparselora_jax.runtime.errors import DataError


@pytest.mark.parametrize(
    ('text', 'letter'),
    [
        ('A', 'A'),
        ('E', 'E'),
        ('F', None),
        ('', None),
        ('AB', None),
        ('a', None),
        (' A', None),
        ('A\n', None),
        ('B. a magnet', 'B'),
        ('B. ', 'B'),
        ('B.', None),
        ('B) a magnet', None),
        ('F. x', None),
        ('BC. x', None),
        ('The answer is C.', 'C'),
        ('Iron rusts. The answer is D because it does.', 'D'),
        # The pattern needs one character after the letter, which is not a line break.
        ('The answer is C', None),
        ('The answer is C\n', None),
        ('the answer is C.', None),
        # Two sentences contradict each other, or repeat each other.
        ('The answer is C. The answer is D.', None),
        ('The answer is C. The answer is C.', None),
        # The letter at the beginning comes first.
        ('A. no. The answer is C.', 'A'),
        # A letter that no question has is found, and is wrong.
        ('The answer is Z.', 'Z'),
        ('The answer is not C.', None),
    ],
)
def test_letters_are_found_by_the_rule_of_llava(text, letter):
    assert answer_letter(text) == letter


def test_accuracy_is_of_all_questions_and_of_those_with_images():
    predictions = ['A', 'B. iron', 'no idea', 'C', 'The answer is B.']
    result = science_qa_accuracy(
        predictions, [0, 1, 0, 1, 1], [2, 3, 4, 2, 5], [True, True, False, True, False], {'subject': list('xxyyy')}
    )
    assert result.per_item.tolist() == [1, 1, 0, 0, 1]
    assert result.aggregate() == pytest.approx(
        {'overall': 60, 'input/image': 200 / 3, 'input/text': 50, 'subject/x': 100, 'subject/y': 100 / 3}
    )


@pytest.mark.parametrize(
    ('answers', 'choices', 'images', 'message'),
    [
        ([0], [2, 2], [True, True], '1 answers for 2 predictions: expected one for each'),
        ([0, 0], [2], [True, True], '1 choices for 2 predictions'),
        ([0, 0], [2, 2], [True], '1 has_image for 2 predictions'),
        (
            [0, 2],
            [2, 2],
            [True, True],
            'question 1: the correct choice is number 2 of 2; expected a number from 0 to 1',
        ),
        ([0, -1], [2, 2], [True, True], 'question 1: the correct choice is number -1 of 2'),
        ([0, 5], [2, 6], [True, True], 'at most 5 choices'),
    ],
)
def test_bad_input_is_one_clear_line(answers, choices, images, message):
    with pytest.raises(DataError, match=message):
        science_qa_accuracy(['A', 'B'], answers, choices, images)
