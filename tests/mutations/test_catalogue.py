"""Every mutation of the catalogue still applies; `make mutations` runs them."""

import ast

import pytest
from catalogue import MUTATIONS
from mutate import ROOT, DoesNotApply, Mutation, mutated


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_applies_in_exactly_one_place(mutation):
    source = mutated(mutation)

    assert ast.dump(ast.parse(source)) != ast.dump(ast.parse((ROOT / mutation.path).read_text()))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_the_tests_of_a_mutation_exist(mutation):
    assert all((ROOT / test).is_file() for test in mutation.tests)


def test_a_pattern_that_is_not_there_is_an_error():
    mutation = Mutation("tests/mutations/mutate.py", "X + W + Z + Y + 77", "X", (), "no such sum")

    with pytest.raises(DoesNotApply, match="in 0 places"):
        mutated(mutation)
