"""Helpers for the tests of all sources: read a whole folder."""

from pathlib import Path

import pytest

from pmd_pipeline.base.record import BadRow, Row
from pmd_pipeline.sources import find_annotations, load

FIXTURES = Path(__file__).parents[1] / "fixtures"
SAMPLES = Path(__file__).parents[2].parent / "shared" / "samples"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no ../shared/samples here")


def read_all(name, folder, form=None, **options):
    source = load(name)
    spans = find_annotations(source, str(folder), form).spans
    return [row for span in spans for row in source.read(span, **options)]


def good_rows(rows):
    return [row for row in rows if isinstance(row, Row)]


def bad_rows(rows):
    return [row for row in rows if isinstance(row, BadRow)]


def texts(rows):
    return [one.text for row in good_rows(rows) for one in row.candidates]
