"""Mutation testing: break the code in one place at a time, and require that a unit test fails.

    python tests/mutations/mutate.py            all mutations of `catalogue.py`, one after another
    python tests/mutations/mutate.py order      those whose module or reason contains `order`

`make mutations` runs the first. It takes about 20 minutes on two cores, so CI leaves it out and
only checks that every mutation still applies (`test_catalogue.py`). The exit code is 1 if a
mutation survives, and 2 if one does not apply.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

WILDCARDS = frozenset("WXYZ")
"""Names in a pattern that stand for any expression, or as an attribute for any name."""

_SECONDS = 1_200
"""Time limit of one run of pytest; a test that hangs has its own, shorter limit."""


@dataclass(frozen=True)
class Mutation:
    """One bug to plant.

    Args:
        path: the file, from the root of the repository.
        old: an expression or a simple statement. It is compared as a syntax tree, so layout and
            comments do not matter; `WILDCARDS` match anything, the same name the same thing.
        new: what replaces it, with the same wildcards.
        tests: test files that should find the bug; they run before the whole unit suite.
        bug: what goes wrong.
        within: the function or class that holds the place, if the file has it more than once.
    """

    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    bug: str
    within: str | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.bug}"


class DoesNotApply(Exception):
    """The file has no such place, or several."""


def mutated(mutation: Mutation, root: Path = ROOT) -> str:
    """The source of the mutation's file, with the bug.

    Raises:
        DoesNotApply: there is not exactly one place.
    """
    path = root / mutation.path
    if not path.is_file():
        raise DoesNotApply(f"{mutation}: there is no such file")
    source = path.read_text(encoding="utf-8")
    pattern = _parsed(mutation.old)
    places = [
        (node, bound)
        for node in _nodes(ast.parse(source), mutation.within)
        if (bound := _match(pattern, node, {})) is not None
    ]
    if len(places) != 1:
        where = f" in {mutation.within}" if mutation.within else ""
        raise DoesNotApply(f"{mutation}: `{mutation.old}` stands in {len(places)} places{where}")
    node, bound = places[0]
    assert isinstance(node, ast.expr | ast.stmt)
    new = ast.unparse(_Fill(bound).visit(_parsed(mutation.new)))
    content = source.encode()
    starts = [0]
    for line in content.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    begin = starts[node.lineno - 1] + node.col_offset
    end = starts[node.end_lineno - 1] + node.end_col_offset
    text = f"({new})" if isinstance(node, ast.expr) else new
    return (content[:begin] + text.encode() + content[end:]).decode()


def main() -> None:
    """Run the mutations that the command line selects, and print a table."""
    from catalogue import MUTATIONS  # noqa: PLC0415 - it imports this module

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="run the mutations that contain one of these")
    parser.add_argument(
        "--chosen-only", action="store_true", help="run no other tests than those of the mutation"
    )
    options = parser.parse_args()
    selected = [
        mutation
        for mutation in MUTATIONS
        if not options.words or any(word in str(mutation) for word in options.words)
    ]
    try:
        sources = [mutated(mutation) for mutation in selected]
    except DoesNotApply as error:
        sys.exit(_exit(2, str(error)))
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder)
        _copy_tree(copy)
        for mutation, source in zip(selected, sources, strict=True):
            start = time.monotonic()
            test = _killer(copy, mutation, source, chosen_only=options.chosen_only)
            survivors += test is None
            seconds = time.monotonic() - start
            print(f"{mutation}\n    {test or 'SURVIVED'} ({seconds:.0f} s)", flush=True)
    print(f"{len(selected) - survivors} of {len(selected)} mutations killed")
    sys.exit(1 if survivors else 0)


def _exit(code: int, message: str) -> int:
    print(message, file=sys.stderr)
    return code


def _parsed(text: str) -> ast.AST:
    (statement,) = ast.parse(text).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def _nodes(tree: ast.AST, within: str | None) -> Iterator[ast.AST]:
    if within is None:
        yield from ast.walk(tree)
        return
    for node in ast.walk(tree):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        if isinstance(node, kinds) and node.name == within:
            yield from ast.walk(node)


def _match(
    pattern: object, value: object, bound: Mapping[str, object]
) -> Mapping[str, object] | None:
    """What the wildcards of `pattern` stand for in `value`, added to `bound`; None if unequal."""
    if isinstance(pattern, ast.Name) and pattern.id in WILDCARDS:
        return _bind(pattern.id, value, bound) if isinstance(value, ast.expr) else None
    if isinstance(pattern, str) and pattern in WILDCARDS:
        return _bind(pattern, value, bound)
    if isinstance(pattern, list) and isinstance(value, list):
        if len(pattern) != len(value):
            return None
        result: Mapping[str, object] | None = bound
        for one, other in zip(pattern, value, strict=True):
            result = None if result is None else _match(one, other, result)
        return result
    if isinstance(pattern, ast.AST) and type(pattern) is type(value):
        fields = [name for name in pattern._fields if name not in {"ctx", "type_comment"}]
        return _match(
            [getattr(pattern, name) for name in fields],
            [getattr(value, name) for name in fields],
            bound,
        )
    return bound if pattern == value else None


def _bind(name: str, value: object, bound: Mapping[str, object]) -> Mapping[str, object] | None:
    if name in bound:
        return _match(bound[name], value, bound)
    return {**bound, name: value}


class _Fill(ast.NodeTransformer):
    """Puts what the wildcards stand for in their place."""

    def __init__(self, bound: Mapping[str, object]) -> None:
        self.bound = bound

    def visit_Name(self, node: ast.Name) -> object:
        return self.bound.get(node.id, node)

    def visit_Attribute(self, node: ast.Attribute) -> object:
        self.generic_visit(node)
        node.attr = str(self.bound.get(node.attr, node.attr))
        return node


def _copy_tree(folder: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # else deleted, and not yet committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def _killer(copy: Path, mutation: Mutation, source: str, *, chosen_only: bool) -> str | None:
    """The first test that fails under the mutation; None if all pass."""
    path = copy / mutation.path
    original = path.read_bytes()
    path.write_text(source, encoding="utf-8")
    try:
        failed = _failed(copy, list(mutation.tests))
        if failed or chosen_only:
            return failed
        return _failed(copy, ["tests", *(f"--ignore={test}" for test in mutation.tests)])
    finally:
        path.write_bytes(original)


def _failed(copy: Path, arguments: list[str]) -> str | None:
    """The first test of `arguments` that fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-m", "not slow"]
    command += ["-p", "no:cacheprovider", "--tb=no", "-rfE", "--ignore=tests/mutations"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",  # two mutations may have one size and one time stamp
    }
    try:
        result = subprocess.run(
            [*command, *arguments],
            cwd=copy,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"pytest took more than {_SECONDS} s"
    if result.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if result.returncode == 1 and found:
        return found[1]
    if "Timeout" in result.stdout + result.stderr:
        return "a test that exceeded its time limit"
    raise SystemExit(f"pytest could not run:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")


if __name__ == "__main__":
    main()
