"""Safetensors files, read and written one tensor at a time.

The format (https://github.com/huggingface/safetensors#format) is eight bytes with the length of a
JSON header, the header with every tensor's dtype, shape and place, then the bytes. It is read here
by plain reads and not through a memory map, whose pages stay counted as memory of the process once
they were touched: the host never holds more than the tensor asked for.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Sequence

import ml_dtypes
import numpy as np

from jaxagentrl.models import git_lfs
from jaxagentrl.models.pretrained_config import PretrainedError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# What weights are loaded and saved in.
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    path: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor in the file.

        Raises:
            PretrainedError: a dtype that weights do not have, such as that of a quantized model.
        """
        return self._numpy_dtype().itemsize * math.prod(self.shape)

    def read(self, rows: slice = slice(None), into: np.ndarray | None = None) -> np.ndarray:
        """The tensor in the dtype it is stored in, or some of its rows (of its first dimension).

        Args:
            rows: a slice without a step.
            into: bytes, uint8 [at least as many as are read], that the result is then a view of;
                None for an array of its own.

        Raises:
            PretrainedError: a dtype that weights do not have, such as that of a quantized model.
        """
        dtype = self._numpy_dtype()
        first, last, _ = rows.indices(self.shape[0]) if self.shape else (0, 1, 1)
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        row_bytes = dtype.itemsize * math.prod(self.shape[1:])
        count = (last - first) * row_bytes
        data = np.empty(count, np.uint8) if into is None else into[:count]
        with self.path.open("rb") as file:
            file.seek(self.start + first * row_bytes)
            if file.readinto(data) != count:
                raise PretrainedError(f"{self.path} became shorter while {self.name} was read.")
        return data.view(dtype).reshape(shape)

    def _numpy_dtype(self) -> np.dtype:
        if self.dtype not in _DTYPES:
            raise PretrainedError(
                f"{self.path}: {self.name} has dtype {self.dtype}, expected one of "
                f"{sorted(_DTYPES)}. Quantized models are not read; use the original weights."
            )
        return _DTYPES[self.dtype]


def contents(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Every tensor of a file by name, from its header alone.

    Raises:
        PretrainedError: the file is missing, cut off or of another format.
    """
    if said := git_lfs.advice(path):
        raise PretrainedError(said)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        begin = 8 + length
        found = {
            name: StoredTensor(
                path, name, entry["dtype"], tuple(entry["shape"]), begin + entry["data_offsets"][0]
            )
            for name, entry in header.items()
        }
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            dtype = _DTYPES.get(entry["dtype"])
            if dtype is not None and last - first != dtype.itemsize * math.prod(entry["shape"]):
                raise ValueError(f"{name} has {last - first} bytes for {entry['dtype']} {entry['shape']}")
        end = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end > size:
            raise ValueError(f"it is cut off: {size} bytes of {end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PretrainedError(
            f"{path} cannot be read: {error}. Download or export the model again."
        ) from error
    return found


@dataclasses.dataclass(frozen=True)
class Spec:
    """A tensor that a file is going to hold."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def write(path: pathlib.Path, specs: Sequence[Spec], tensors: Iterable[np.ndarray]) -> None:
    """Writes the tensors, which may be made one by one while they are asked for.

    Raises:
        ValueError: a tensor is not what its spec says.
    """
    # transformers refuses files without a format.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.num_bytes],
        }
        start += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for spec, tensor in zip(specs, tensors, strict=True):
            if tensor.dtype != spec.dtype or tensor.shape != spec.shape:
                raise ValueError(
                    f"{spec.name} is {tensor.dtype} {tensor.shape}, expected {spec.dtype} "
                    f"{spec.shape}."
                )
            np.ascontiguousarray(tensor).view(np.uint8).tofile(file)
        file.flush()
        os.fsync(file.fileno())
