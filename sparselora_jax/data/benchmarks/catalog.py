"""The benchmarks by name: where their records come from, and how many items they have.

Names are those of lmms-eval. To add a benchmark, register a `Benchmark`, or name one as `package.module:Name`.
"""

from dataclasses import dataclass, replace

from sparselora_jax.data.benchmarks import (
    coco_captions,
    gqa,
    lavis,
    parquet_forms,
    pope,
    science_qa,
    text_vqa,
    vizwiz,
    vqa_pair,
)
from sparselora_jax.data.benchmarks.parquet import ParquetTables
from sparselora_jax.data.benchmarks.source import Finder
from sparselora_jax.data.task_format import TaskKind
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.registry import Registry, UnknownNameError


@dataclass(frozen=True)
class Benchmark:
    """A split of a data set that models are scored on.

    Attributes:
      title: its name in words.
      task: the kind of answer: free text, a caption, the letter of a choice, yes or no, or the images and texts that
        belong together.
      count: number of items that published scores are about.
      needs: the files to download, for messages.
      finders: find its records in the formats that exist, the best first.
    """

    title: str
    task: TaskKind
    count: int
    needs: str
    finders: tuple[Finder, ...]


BENCHMARKS: Registry[Benchmark] = Registry('benchmark')

# Counts are those of the published files. Several readers also state them: the evaluators of LAVIS and the tables of
# the Hugging Face data sets.
# Parquet files call the split either way.
_VAL = ('validation', 'val')
_VQAV2_QUESTIONS = 'v2_OpenEnded_mscoco_{}_questions.json'

# The published files come first: LAVIS's list has no groups, and parquet files repeat the image for each question.
BENCHMARKS.register(
    'vqav2_val',
    Benchmark(
        'VQAv2, validation',
        'answer',
        214_354,
        f'{_VQAV2_QUESTIONS.format("val2014")} and v2_mscoco_val2014_annotations.json',
        (
            vqa_pair.VqaPair('vqav2', 'val2014'),
            lavis.LavisQuestions('vqav2', 'val2014'),
            ParquetTables(parquet_forms.VQAV2, _VAL),
        ),
    ),
)
# The answers of both test splits are secret: a server scores them. Test-dev is a part of the test split, and its images
# are in the same folder, test2015.
BENCHMARKS.register(
    'vqav2_test',
    Benchmark(
        'VQAv2, test',
        'answer',
        447_793,
        _VQAV2_QUESTIONS.format('test2015'),
        (
            vqa_pair.VqaPair('vqav2', 'test2015', has_answers=False),
            lavis.LavisQuestions('vqav2', 'test2015'),
            ParquetTables(parquet_forms.VQAV2, ('test',)),
        ),
    ),
)
# A part of the test split, whose images it shares.
BENCHMARKS.register(
    'vqav2_testdev',
    Benchmark(
        'VQAv2, test-dev',
        'answer',
        107_394,
        _VQAV2_QUESTIONS.format('test-dev2015'),
        (
            vqa_pair.VqaPair('vqav2', 'test-dev2015', has_answers=False),
            ParquetTables(parquet_forms.VQAV2, ('testdev',)),
        ),
    ),
)
# The answers of OK-VQA are stemmed, so evaluators lemmatise what a model says. Papers report this split as a test set.
BENCHMARKS.register(
    'ok_vqa_val2014',
    Benchmark(
        'OK-VQA, validation',
        'answer',
        5_046,
        'OpenEnded_mscoco_val2014_questions.json and mscoco_val2014_annotations.json of OK-VQA',
        (
            vqa_pair.VqaPair('ok_vqa', 'val2014'),
            lavis.LavisQuestions('ok_vqa', 'val2014'),
            ParquetTables(parquet_forms.OK_VQA, ('val2014', *_VAL)),
        ),
    ),
)
# Published figures of GQA are those of testdev, unless they say otherwise. The file with all questions, `testdev_all`,
# has 172,174; in the balanced one, no answer of a type dominates.
BENCHMARKS.register(
    'gqa',
    Benchmark(
        'GQA, testdev, balanced',
        'answer',
        12_578,
        'testdev_balanced_questions.json',
        (gqa.GqaQuestions('testdev'), ParquetTables(parquet_forms.GQA, ('testdev',))),
    ),
)
BENCHMARKS.register(
    'gqa_val',
    Benchmark(
        'GQA, validation, balanced',
        'answer',
        132_062,
        'val_balanced_questions.json',
        (gqa.GqaQuestions('val'), ParquetTables(parquet_forms.GQA, _VAL)),
    ),
)
# The test split of NoCaps has no public captions. Those of the validation split are scored by domain too, which the
# parquet files do not tell.
BENCHMARKS.register(
    'nocaps_val',
    Benchmark(
        'NoCaps, validation',
        'caption',
        4_500,
        'nocaps_val_4500_captions.json',
        (
            coco_captions.CocoCaptions(coco_captions.NOCAPS, 'val'),
            ParquetTables(parquet_forms.NOCAPS, _VAL),
        ),
    ),
)
# Karpathy drew both splits from the images of val2014; the rest of val2014 ("restval") is used for training.
for _subset, _splits in (('test', ('test',)), ('val', _VAL)):
    BENCHMARKS.register(
        f'coco_karpathy_{_subset}',
        Benchmark(
            f"COCO captions, Karpathy's {_subset} split",
            'caption',
            5_000,
            f'dataset_coco.json or coco_karpathy_{_subset}.json',
            (
                coco_captions.KarpathySplit('coco', _subset),
                lavis.LavisCaptions('coco', _subset),
                ParquetTables(parquet_forms.KARPATHY, _splits, column_split=_subset),
            ),
        ),
    )
# In 2017, the 5,000 images of the new validation split were drawn from those of val2014, with the same captions.
for _year, _count in (('2014', 40_504), ('2017', 5_000)):
    BENCHMARKS.register(
        f'coco{_year}_cap_val',
        Benchmark(
            f'COCO captions, validation, {_year}',
            'caption',
            _count,
            f'captions_val{_year}.json',
            (
                coco_captions.CocoCaptions(coco_captions.COCO, f'val{_year}'),
                ParquetTables(parquet_forms.COCO, (*_VAL, f'val{_year}'), subset=f'val{_year}'),
            ),
        ),
    )
# lmms-eval scores all 31,783 images under this name; papers report the 1,000 of Karpathy's test split.
BENCHMARKS.register(
    'flickr30k_test',
    Benchmark(
        "Flickr30k, Karpathy's test split",
        'caption',
        1_000,
        'dataset_flickr30k.json or flickr30k_test.json',
        (
            coco_captions.KarpathySplit('flickr30k', 'test'),
            lavis.LavisCaptions('flickr30k', 'test'),
            ParquetTables(parquet_forms.FLICKR30K, ('test',), column_split='test'),
        ),
    ),
)
# Retrieval: the same files; every image is searched for among all captions, and every caption among all images.
for _name in ('flickr30k_test', 'coco_karpathy_test'):
    _captions = BENCHMARKS.find(_name)
    BENCHMARKS.register(
        f'{_name}_retrieval', replace(_captions, title=f'{_captions.title}, retrieval', task='retrieval')
    )
# The answers of the test split are secret, so papers report the validation split.
BENCHMARKS.register(
    'textvqa_val',
    Benchmark(
        'TextVQA, validation',
        'answer',
        5_000,
        'TextVQA_0.5.1_val.json',
        (text_vqa.TextVqa('val'), ParquetTables(parquet_forms.TEXT_VQA, _VAL)),
    ),
)
# Many of these questions cannot be answered from the image; the groups tell them apart.
BENCHMARKS.register(
    'vizwiz_vqa_val',
    Benchmark(
        'VizWiz-VQA, validation',
        'answer',
        4_319,
        'val.json of VizWiz-VQA',
        (vizwiz.VizWiz('val'), ParquetTables(parquet_forms.VIZWIZ, _VAL)),
    ),
)
# The test split has 4,241 questions; those without an image say nothing about a vision-language model.
BENCHMARKS.register(
    'scienceqa_img',
    Benchmark(
        'ScienceQA, test, questions with an image',
        'choice',
        2_017,
        'problems.json and pid_splits.json',
        (science_qa.ScienceQa('test'), ParquetTables(parquet_forms.SCIENCE_QA, ('test',))),
    ),
)
# Three categories of 3,000 questions. An older release of the random file, which LLaVA's evaluation names, has 2,910.
BENCHMARKS.register(
    'pope',
    Benchmark(
        'POPE on COCO',
        'yes_no',
        9_000,
        'coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json',
        (pope.Pope(), ParquetTables(parquet_forms.POPE, ('test',))),
    ),
)


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by its name.

    Args:
      name: a registered name, or `package.module:Name`.

    Raises:
      DataError: there is no such benchmark; the message suggests the nearest name.

    >>> find_benchmark('gqa').count
    12578
    """
    try:
        benchmark = BENCHMARKS.find(name)
    except UnknownNameError as error:
        raise DataError(str(error)) from None
    if not isinstance(benchmark, Benchmark):
        raise DataError(f'benchmark {name!r}: expected a catalog.Benchmark, not a {type(benchmark).__name__}')
    return benchmark
