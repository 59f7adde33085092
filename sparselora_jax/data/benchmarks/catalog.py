"""The benchmarks by name: where their records come from, and how many items they have.

Names are those of lmms-eval. To add a benchmark, register a `Benchmark`, or name one as `package.module:Name`.
"""

from dataclasses import dataclass
from typing import Literal

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
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.registry import Registry, UnknownNameError


@dataclass(frozen=True)
class Benchmark:
    """A split of a data set that models are scored on.

    Attributes:
      title: its name in words.
      task: the kind of answer: free text, a caption, the letter of a choice, or yes or no.
      count: number of items that published scores are about.
      needs: the files to download, for messages.
      finders: find its records in the formats that exist, the best first.
    """

    title: str
    task: Literal['answer', 'caption', 'choice', 'yes_no']
    count: int
    needs: str
    finders: tuple[Finder, ...]


BENCHMARKS: Registry[Benchmark] = Registry('benchmark')

_VAL = ('validation', 'val')
_VQAV2_QUESTIONS = 'v2_OpenEnded_mscoco_{}_questions.json'

# The published files come first: scores of the benchmark's server are about them. LAVIS's lists lack the types of
# questions and answers, and a parquet file copies its images.
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
# Nobody but the server has the answers of the test splits.
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
# OK-VQA has no test split; papers report this one.
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
# The split that papers call GQA: answers of `testdev` are public.
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
# Domains say whether COCO's classes are in the image. Parquet files leave them out.
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
# Karpathy and Fei-Fei (arXiv 1412.2306) divided COCO's validation images of 2014; captioning papers use their splits.
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
# The release of 2017 moved most of these images to training, so the two splits are not comparable.
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
# The answers of TextVQA's test split are not public.
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
# Half of ScienceQA's questions have no image and say nothing about a vision tower.
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
# Three files of 3,000 questions about the same 500 images.
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
