"""COCO's own evaluation code, an independent implementation of the metrics of captions."""

import importlib
import shutil

import pytest

REASON = "compares with COCO's evaluation code; run: pip install --no-deps pycocoevalcap==1.2"

needs_java = pytest.mark.skipif(
    shutil.which('java') is None, reason='runs a Java program; install a Java runtime, such as default-jre-headless'
)


def scorer(module, name, *arguments):
    """Return a scorer of pycocoevalcap, or skip the test."""
    pytest.importorskip('pycocoevalcap', reason=REASON)
    return getattr(importlib.import_module(f'pycocoevalcap.{module}'), name)(*arguments)


def by_image(predictions, references):
    """Return references and predictions in the form of pycocoevalcap."""
    return dict(enumerate(map(list, references))), {image: [caption] for image, caption in enumerate(predictions)}
