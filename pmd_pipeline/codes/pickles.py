"""Tensors of a PyTorch pickle, read without executing it.

OpenAI publishes the dVAE's encoder as a pickled module (`encoder.pkl`). A pickle names classes and
functions for its reader to call, so an ordinary reader runs any code of its author. Here a few
names are mapped to stand-ins that only hold arrays; every other name is refused. torch is not used.
"""

import io
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import read_bytes

_MODULES = frozenset(
    {
        ("dall_e.encoder", "Encoder"),
        ("dall_e.encoder", "EncoderBlock"),
        ("dall_e.utils", "Conv2d"),
        ("torch.nn.modules.activation", "ReLU"),
        ("torch.nn.modules.container", "Sequential"),
        ("torch.nn.modules.linear", "Identity"),
        ("torch.nn.modules.pooling", "MaxPool2d"),
    }
)
"""Classes of OpenAI's encoder that hold tensors or other modules."""

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "DoubleStorage": np.dtype("<f8"),
}
_MAGIC = 0x1950A86A20F9469CFC6C
"""First pickle of the older container."""

_PROTOCOL = 1001
_READ_ERRORS = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, ImportError, LookupError,
    MemoryError, RuntimeError, TypeError, ValueError, struct.error, zipfile.BadZipFile,
    AssertionError,
)  # fmt: skip
"""Errors of reading bytes that only look like a pickle or a zip."""


def read_pickle(address: str) -> dict[str, NDArray[Any]]:
    """The tensors in the pickled module, or pickled mapping of tensors, at `address`, by name.

    Both containers of PyTorch are read: the zip, and the older sequence of pickles.

    Raises:
        PmdError: it is not a pickle of PyTorch, or names anything that a module of convolutions
            does not need.
    """
    content = read_bytes(address)
    try:
        read = _read_zip if zipfile.is_zipfile(io.BytesIO(content)) else _read_sequence
        tensors = dict(_tensors(read(content), "", set()))
        if sum(array.nbytes for array in tensors.values()) > len(content):
            raise ValueError("its tensors hold more numbers than it has bytes for")
        return {name: np.array(array) for name, array in tensors.items()}
    except _Refused as refused:
        raise PmdError(
            f"{address} is refused: it asks for {refused}, which an image tokenizer does not need; "
            "nothing in it was executed"
        ) from refused
    except _READ_ERRORS as error:
        raise PmdError(f"{address} is not a pickle that PyTorch writes of a module: {error}") from (
            error
        )


class _Refused(Exception):
    """The pickle names something that is not allowed; the text is its name."""


@dataclass(eq=False)
class _Module:
    """Stand-in for any module: its state in the pickle."""

    state: dict[str, Any] = field(default_factory=dict)

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.state = state


@dataclass(frozen=True)
class _Class:
    """Stand-in for a storage class: the type of its numbers."""

    dtype: np.dtype[Any]


@dataclass(eq=False)
class _Storage:
    """An array of numbers, which the older container has after the pickle that names it."""

    dtype: np.dtype[Any]
    count: int
    values: NDArray[Any] | None = None


@dataclass(eq=False)
class _Tensor:
    """A tensor whose storage may not be read yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> NDArray[Any]:
        """The numbers; an error where they would lie outside the storage."""
        # checked here, since a pickle can also change an object that it has made
        values = self.storage.values if isinstance(self.storage, _Storage) else None
        if not isinstance(values, np.ndarray) or not isinstance(self.shape, tuple):
            raise TypeError("a tensor has no numbers")
        sizes = (*self.shape, *self.strides, self.offset)
        if len(self.shape) != len(self.strides) or not all(
            isinstance(size, int) and 0 <= size <= values.size for size in sizes
        ):
            raise ValueError("a tensor has an impossible shape")
        last = self.offset + sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)
        )
        if 0 not in self.shape and last >= values.size:
            raise ValueError("a tensor reaches beyond its numbers")
        if np.prod(self.shape, dtype=np.float64) > values.size:
            raise ValueError("a tensor has more numbers than its storage")
        steps = [stride * values.itemsize for stride in self.strides]
        return as_strided(values[self.offset :], self.shape, steps, writeable=False)


_StorageOf: TypeAlias = Callable[[str, np.dtype[Any], int], _Storage]
"""The storage of a key, for a type of numbers and their count."""


class _Unpickler(pickle.Unpickler):
    """Reads one pickle; names are mapped to stand-ins or refused.

    Functions are methods of this object, which a pickle can call but not change.
    """

    def __init__(self, content: io.BytesIO, storage: _StorageOf) -> None:
        super().__init__(content, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str, /) -> Any:  # noqa: ANN401 - as pickle has it
        if (module, name) in _MODULES:
            return _Module
        if module == "torch" and name in _DTYPES:
            return _Class(_DTYPES[name])
        allowed = {
            ("__builtin__", "set"): set,
            ("builtins", "set"): set,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "device"): self._device,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
        }
        if (module, name) not in allowed:
            raise _Refused(f"{module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid: Any, /) -> Any:  # noqa: ANN401 - as pickle has it
        match pid:
            case ("storage", _Class() as kind, str(key), str(), int(count), *_):
                return self._storage(key, kind.dtype, count)
            case ("module", kind, str(), str()) if kind is _Module:
                return _Module  # the older container stores the source of classes, too
        raise _Refused("a persistent id of an unknown kind")

    def _device(self, *_: object) -> None:
        return None

    def _tensor(
        self, storage: object, offset: object, shape: object, strides: object, *_: object
    ) -> _Tensor:
        if not (
            isinstance(storage, _Storage)
            and isinstance(offset, int)
            and isinstance(shape, tuple)
            and isinstance(strides, tuple)
        ):
            raise TypeError("a tensor is not made of numbers")
        return _Tensor(storage, offset, shape, strides)

    def _parameter(self, tensor: object, *_: object) -> object:
        return tensor


def _read_zip(content: bytes) -> object:
    """The root object of the zip container; each storage is a stored member."""
    storages: dict[str, _Storage] = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        roots = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("it has no data.pkl")
        folder = roots[0].removesuffix("data.pkl")

        def member(name: str) -> bytes:
            info = archive.getinfo(folder + name)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(content):
                raise ValueError("a member is compressed, which PyTorch never does")
            return archive.read(info)

        if f"{folder}byteorder" in archive.namelist() and member("byteorder") != b"little":
            raise ValueError("its numbers are big-endian")

        def storage(key: str, dtype: np.dtype[Any], count: int) -> _Storage:
            if key not in storages:
                storages[key] = _Storage(
                    dtype, count, _numbers(member(f"data/{key}"), dtype, count)
                )
            return storages[key]

        return _load(io.BytesIO(member("data.pkl")), storage)


def _read_sequence(content: bytes) -> object:
    """The root object of the older container: magic, version, system, object, keys, numbers."""
    file = io.BytesIO(content)
    storages: dict[str, _Storage] = {}

    def storage(key: str, dtype: np.dtype[Any], count: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, count))

    def next_pickle() -> object:
        return _load(file, storage)

    if next_pickle() != _MAGIC or next_pickle() != _PROTOCOL:
        raise ValueError("it does not begin as one")
    next_pickle()  # the byte order and sizes of the machine that wrote it
    root, keys = next_pickle(), next_pickle()
    if not isinstance(keys, list):
        raise TypeError("it has no list of the numbers that follow")
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        numbers = storages[key]
        if count != numbers.count:
            raise ValueError("numbers are missing")
        numbers.values = _numbers(file.read(count * numbers.dtype.itemsize), numbers.dtype, count)
    return root


def _load(file: io.BytesIO, storage: _StorageOf) -> object:
    """The object of the pickle that begins here; the file is then at its end."""
    start, most = file.tell(), len(file.getbuffer())
    with warnings.catch_warnings(action="ignore"):  # about strings of protocol 0
        for opcode, argument, _ in pickletools.genops(file):
            # unpickling allocates entries up to the highest number, even a billion
            if "PUT" in opcode.name and isinstance(argument, int) and argument > most:
                raise ValueError("it numbers more objects than it has bytes for")
        file.seek(start)
        return _Unpickler(file, storage).load()


def _numbers(content: bytes, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    if len(content) != count * dtype.itemsize:
        raise ValueError("numbers are missing")
    return np.frombuffer(content, dtype=dtype)


def _tensors(root: object, path: str, seen: set[int]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Tensors below `root` by their dotted names, as in `state_dict`.

    An object is visited once, since a few lines of pickle can make exponentially many paths.
    """
    if isinstance(root, _Tensor):
        yield path, root.array()
        return
    if id(root) in seen or not isinstance(root, _Module | Mapping):
        return
    seen.add(id(root))
    if isinstance(root, _Module):
        for part in ("_parameters", "_modules"):
            yield from _tensors(root.state.get(part), path, seen)
    else:
        for name, inner in root.items():
            yield from _tensors(inner, f"{path}.{name}" if path else str(name), seen)
