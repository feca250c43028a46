"""A user's mistake ends a command with one line on stderr and a fixed exit code, whatever it says.

The sentences are tested beside what they tell of; here only their form is.
"""

import json

import pytest
from golden_commands import run

FILES = {
    "filter.toml": 'source = "cc3m"\n[captions.filters]\nhas_wrods = {}\n',
    "key.toml": 'source = "cc3m"\n[image]\nsize = 64\n',
    "changed.json": json.dumps(
        {
            "format": 3,
            "name": "toy",
            "sources": {},
            "shards": [],
            "versions": {},
            "digest": "0" * 64,  # not that of the rest
        }
    ),
}

pytestmark = pytest.mark.slow

MISTAKES = [
    "pmd build",
    "pmd build --source coca",
    "pmd build --source cc3m --raw none",
    "pmd build --recipe filter.toml",
    "pmd build --recipe key.toml",
    "pmd retry --source cc3m --reason timeuot",
    "pmd stats none.json",
    "pmd stats changed.json",
    "pmd verify changed.json",
    "pmd lock changed.json",
    "pmd rebuild none",
    "pmd why 0000000000000000",
    "pmd quickstart --scenes 40",
    "flava-train --config flava_pdm",
    "flava-train --config flava_tiny --set optimizer.lrr=1",
    "flava-train --config flava_tiny --shards none.json --out .",
    "flava-train shards --shards changed.json",
    "flava-train export none --hf exported",
]


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(command, tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)

    done = run(*command.split(), cwd=tmp_path)

    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.count("\n") == 1, done.err
    assert done.err.endswith("\n")
    left = {path.name for path in tmp_path.iterdir()} - {".lock"}  # what guards a run's folder
    assert left == FILES.keys()
