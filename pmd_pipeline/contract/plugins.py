"""Code of the user's own, named as `module:function` where a recipe or configuration names ours.

The module is found as `python -m` would find it: in the working directory, or installed. Worker
processes that this one starts find it as well; machines of a cluster need it installed.
"""

import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.suggestions import suggestion

_REFERENCE = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")


def is_reference(name: str) -> bool:
    """Whether `name` is of the form `module:function`.

    >>> is_reference("my_filters:is_sharp"), is_reference("has_words")
    (True, False)
    """
    return _REFERENCE.fullmatch(name) is not None


def load_reference(reference: str) -> Any:  # noqa: ANN401 - whatever the user's module defines
    """What `module:function` names.

    Raises:
        PmdError: there is no such module or name, or importing the module raises.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise PmdError(f"{reference!r} is not of the form module:function")
    module = _imported(match["module"], reference)
    try:
        return getattr(module, match["name"])
    except AttributeError as error:
        near = suggestion(match["name"], _public(vars(module)))
        raise PmdError(
            f"{reference}: {module.__file__} defines no {match['name']!r}; {near}"
        ) from error


def load_module(name: str) -> Any:  # noqa: ANN401 - a module of the user's own
    """The user's module called `name`, as `load_reference` finds it.

    Raises:
        PmdError: there is no such module, or importing it raises.
    """
    return _imported(name, name)


def source_digest(reference: str) -> str:
    """SHA-256 of the file of a module, or of the module of `module:function`, before its import.

    It stands in the rules of a dataset, so that a changed filter makes its parts stale. Modules
    that the file imports are not covered.

    Raises:
        PmdError: there is no such module, or it has no file.
    """
    name = reference.partition(":")[0]
    _add_working_directory()
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(name)
    except Exception as error:  # a package around the module is imported, and may raise anything
        raise _import_error(reference, name, error) from error
    if spec is None:
        raise _no_module(reference, name)
    try:
        return _digest_of(str(spec.origin))
    except OSError as error:
        raise PmdError(f"{reference}: its source file cannot be read") from error


def check_digest(reference: str, stated: str | None) -> None:
    """Refuse, before its import, a file other than the one whose SHA-256 is stated.

    So rules of a stranger run no code but what the user has and the stranger has, too.

    Raises:
        PmdError: it is another, or no SHA-256 is stated; or see `source_digest`.
    """
    if stated is None:
        raise PmdError(f"{reference}: the rules state no SHA-256 of its file, so it is not run")
    if source_digest(reference) != stated:
        raise PmdError(
            f"{reference}: its file has another SHA-256 than {stated[:16]}...; take the file of "
            "that SHA-256, or build again with this one"
        )


def failure(reference: str, error: Exception, subject: str = "") -> PmdError:
    """An exception of the user's own code as one sentence, with the line of their module.

    Args:
        reference: `module:function` that raised it.
        error: the exception.
        subject: what the function was called for, in a few words.
    """
    path = getattr(sys.modules.get(reference.partition(":")[0]), "__file__", None)
    lines = [one for one in traceback.extract_tb(error.__traceback__) if one.filename == path]
    where = f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""
    call = f"{reference} {subject}".rstrip()
    return PmdError(f"{call} fails: {type(error).__name__}: {error}{where}")


_imported_digests: dict[str, str] = {}
"""SHA-256 of the file of each module as it was imported, so that a changed one is imported anew."""


def _imported(name: str, reference: str) -> Any:  # noqa: ANN401 - a module
    _add_working_directory()
    importlib.invalidate_caches()
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:  # without bytecode, which Python takes for current by the second and the size
        module = importlib.import_module(name)
        digest = _digest_of(module.__file__) if module.__file__ else ""
        if _imported_digests.setdefault(name, digest) != digest:
            del sys.modules[name]
            module = importlib.import_module(name)
            _imported_digests[name] = digest
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise _import_error(reference, name, error) from error
    finally:
        sys.dont_write_bytecode = writes_bytecode
    return module


def _import_error(reference: str, name: str, error: BaseException) -> PmdError:
    if not isinstance(error, ModuleNotFoundError):
        return PmdError(f"{reference}: importing {name} fails: {type(error).__name__}: {error}")
    if error.name and (name == error.name or name.startswith(f"{error.name}.")):
        return _no_module(reference, name)
    return PmdError(f"{reference}: importing {name} fails: {error}")


def _no_module(reference: str, name: str) -> PmdError:
    return PmdError(f"{reference}: there is no module {name!r} in {Path.cwd()} or installed")


def _digest_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _add_working_directory() -> None:
    """Let this process and those that it starts import from the working directory, last."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, paths), folder])


def _public(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith("_")]
