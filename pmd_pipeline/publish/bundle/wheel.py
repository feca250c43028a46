"""A wheel of the code that runs here, from an installation or a checkout.

Build libraries need a source tree, which an installation does not have; see docs/decisions.md.
"""

import base64
import hashlib
import zipfile
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

from pmd_pipeline.publish.bundle.project import NAME, Project
from pmd_pipeline.recipe import recipe_folder

PACKAGES = ("pmd_pipeline", "flava_train")

_TIME = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip can store: the same for all members, so that bytes are too."""

_WHEEL = "Wheel-Version: 1.0\nGenerator: pmd bundle\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def wheel(project: Project) -> tuple[str, bytes]:
    """The file name and the content of a wheel of `project`; the same bytes for the same files."""
    base = f"{NAME.replace('-', '_')}-{project.version}"
    metadata = {f"{base}.dist-info/{name}": text for name, text in project.metadata.items()}
    metadata[f"{base}.dist-info/WHEEL"] = _WHEEL
    encoded = {name: text.encode() for name, text in metadata.items()}
    members = dict(sorted({**_packages(), **encoded}.items()))
    record = f"{base}.dist-info/RECORD"
    lines = [f"{name},sha256={_urlsafe(body)},{len(body)}\n" for name, body in members.items()]
    members[record] = "".join([*lines, f"{record},,\n"]).encode()
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name, _TIME)
            member.external_attr = 0o100644 << 16
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, content)
    return f"{base}-py3-none-any.whl", out.getvalue()


def _packages() -> dict[str, bytes]:
    """Every file of the packages, by its path in the wheel."""
    members: dict[str, bytes] = {}
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        members |= _files(Path(spec.origin).parent, package)
    return members | _files(recipe_folder(), "pmd_pipeline/_recipes")


def _files(folder: Path, prefix: str) -> dict[str, bytes]:
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def _urlsafe(content: bytes) -> str:
    digest = hashlib.sha256(content).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
