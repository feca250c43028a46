import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import flava_train

GOLDEN = Path(__file__).parents[1] / "golden" / "api_flava_train.txt"


def surface():
    """The public names with their signatures, a line each."""
    for name in sorted(flava_train.__all__):
        item = getattr(flava_train, name)
        yield f"{name}{inspect.signature(item)}"
        if inspect.isclass(item):
            for method, function in vars(item).items():
                is_own = inspect.isfunction(function) or isinstance(function, property)
                if is_own and not method.startswith("_"):
                    shape = inspect.signature(function) if inspect.isfunction(function) else ""
                    yield f"{name}.{method}{shape}"


def test_the_public_names_and_signatures_are_these(pytestconfig):
    text = "".join(f"{line}\n" for line in surface())
    if pytestconfig.getoption("--golden-rewrite", default=False):
        GOLDEN.write_text(text, encoding="utf-8")

    assert text == GOLDEN.read_text(encoding="utf-8")


def test_every_public_name_has_a_docstring():
    for name in flava_train.__all__:
        assert getattr(flava_train, name).__doc__


def test_importing_the_package_loads_nothing():
    script = (
        "import sys, flava_train; print([m for m in sys.modules if m[:5] in {'flava', 'torch'}])"
    )

    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)

    assert done.stdout == b"['flava_train']\n"


def test_a_name_that_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'PiarDataset'"):
        _ = flava_train.PiarDataset
