"""The members of a bundle, written to a folder or a tar with a file of their digests."""

import hashlib
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, sha256_of, whole_file
from pmd_pipeline.publish.bundle.contents import Content

SUMS = "SHA256SUMS"

_CHUNK = 1 << 20


def pack(members: Mapping[str, Content], out: str) -> int:
    """Write the members to the folder or `.tar` at `out`, in order of name; the number of files.

    A tar has the same bytes for the same members: USTAR, no times, no owners. In a folder,
    `SHA256SUMS` is written last; other files there are an error, since nothing covers them.

    Raises:
        PmdError: `out` is a folder with other files in it, or cannot be written.
    """
    ordered: dict[str, Content] = dict(sorted(members.items()))
    ordered[SUMS] = "".join(f"{_sha256(c)}  {name}\n" for name, c in ordered.items()).encode()
    if out.endswith(".tar"):
        _pack_tar(ordered, out)
    else:
        _pack_folder(ordered, Path(out))
    return len(ordered)


def _pack_tar(members: Mapping[str, Content], out: str) -> None:
    with (
        whole_file(out) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.size = content.stat().st_size
                with content.open("rb") as source:
                    tar.addfile(member, source)


def _pack_folder(members: Mapping[str, Content], out: Path) -> None:
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    if out.is_file() or present - members.keys():
        raise PmdError(f"--out {out} holds other files: give a new folder, or a name with .tar")
    for name, content in members.items():
        with whole_file(join(str(out), name)) as file:
            if isinstance(content, bytes):
                file.write(content)
                continue
            with content.open("rb") as source:
                while chunk := source.read(_CHUNK):
                    file.write(chunk)


def _sha256(content: Content) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    return sha256_of(str(content))
