import doctest
import importlib
import importlib.util
import pkgutil

import pytest

import pmd_pipeline

NEEDS_TORCH = ("pmd_pipeline.codes.dvae",)
MODULES = [
    found.name
    for found in pkgutil.walk_packages(pmd_pipeline.__path__, "pmd_pipeline.")
    if importlib.util.find_spec("torch") or not found.name.startswith(NEEDS_TORCH)
]


@pytest.mark.parametrize("name", MODULES)
def test_every_example_in_a_docstring_is_true(name):
    result = doctest.testmod(importlib.import_module(name))

    assert result.failed == 0


def test_examples_are_found():
    assert {"pmd_pipeline.base.record", "pmd_pipeline.filters.caption"} <= set(MODULES)
    assert doctest.testmod(importlib.import_module("pmd_pipeline.filters.caption")).attempted > 0
