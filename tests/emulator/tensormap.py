"""Tensor maps: the host's description of a tensor for the copy engine (PTX ISA 5.5.8).

The layout of a CUtensorMap is not public. The emulator has its own 128 bytes, which kernels may
copy and edit with `tensormap.replace` as they do on the device.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .errors import DescriptorError, OutOfBounds, Unsupported
from .memory import Memory, Region

BYTES = 128
_MAGIC = b"PTXEMU01"
_FORMAT = "<8sQBBB5x5Q4Q5I"

# CUtensorMapDataType names, their sizes, and the NumPy types of their arithmetic.
_TYPES: list[tuple[str, int, object]] = [
    ("uint8", 1, np.uint8), ("uint16", 2, np.uint16), ("uint32", 4, np.uint32),
    ("int32", 4, np.int32), ("uint64", 8, np.uint64), ("int64", 8, np.int64),
    ("float16", 2, np.float16), ("float32", 4, np.float32), ("float64", 8, np.float64),
    ("bfloat16", 2, ml_dtypes.bfloat16),
]  # fmt: skip
_SWIZZLES = (0, 32, 64, 128)


def _type_index(dtype) -> int:
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name.startswith("float8"):
        name = "uint8"  # the copy engine has no FP8 type; FP8 travels as bytes
    for index, (known, _, _) in enumerate(_TYPES):
        if known == name:
            return index
    raise DescriptorError(f"tensor map: no data type {name!r}; known: {[t[0] for t in _TYPES]}")


class TensorMap:
    """The arguments of cuTensorMapEncodeTiled, checked by its rules (CUDA Driver API, 6.30).

    Arguments:
        array: a NumPy array, or `(memory, address)` for a buffer of a `Memory`.
        dims: size of each dimension in elements, innermost first; 1 to 5 of them.
        strides: bytes between elements of dimensions 1 and up.
        box: size of the box that one copy moves, in elements, innermost first.
        swizzle: 0, 32, 64 or 128.
        dtype: the element type: a NumPy or ml_dtypes type, or its name. FP8 counts as uint8.

    Interleave is none, element strides are 1 and out-of-bounds elements are filled with zeros.

    Raises:
        DescriptorError: what the driver answers with CUDA_ERROR_INVALID_VALUE.
    """

    def __init__(self, array, dims, strides, box, swizzle=0, dtype=None):
        self.array: np.ndarray | None = None
        self.memory: Memory | None = None
        self.address: int | None = None
        if isinstance(array, tuple):
            self.memory, address = array
            self.address = int(address)
        else:
            self.array = np.asarray(array)
            dtype = self.array.dtype if dtype is None else dtype
        if dtype is None:
            raise DescriptorError("tensor map: dtype is missing")
        self.type = _type_index(dtype)
        self.dims = tuple(int(d) for d in dims)
        self.strides = tuple(int(s) for s in strides)
        self.box = tuple(int(b) for b in box)
        self.swizzle = int(swizzle)
        self._check()

    @property
    def itemsize(self) -> int:
        return _TYPES[self.type][1]

    def _check(self):
        rank = len(self.dims)
        item = self.itemsize

        def require(condition: bool, message: str):
            if not condition:
                raise DescriptorError(f"tensor map: {message}")

        require(1 <= rank <= 5, f"rank {rank} is not in 1..5")
        require(len(self.strides) == rank - 1, f"{len(self.strides)} strides for rank {rank}")
        require(len(self.box) == rank, f"{len(self.box)} box sizes for rank {rank}")
        for d in self.dims:
            require(1 <= d <= 2**32, f"dimension {d} is not in 1..2^32")
        for s in self.strides:
            require(0 < s < 2**40, f"stride {s} is not in 1..2^40-1")
            require(s % 16 == 0, f"stride {s} is not a multiple of 16 bytes")
        for b in self.box:
            require(1 <= b <= 256, f"box size {b} is not in 1..256")
        inner = self.box[0] * item
        require(inner % 16 == 0, f"inner box of {inner} bytes is not a multiple of 16")
        require(self.swizzle in _SWIZZLES, f"swizzle {self.swizzle} is not in {_SWIZZLES}")
        if self.swizzle:
            require(
                inner <= self.swizzle,
                f"inner box of {inner} bytes exceeds the {self.swizzle}-byte swizzle",
            )
        if self.address is not None:
            require(
                self.address % 16 == 0, f"address {self.address:#x} is not a multiple of 16 bytes"
            )

    def encode(self, memory: Memory | None = None) -> bytes:
        """The 128 bytes of the kernel parameter; an array is placed in `memory` first."""
        address = self.address
        if address is None:
            assert self.array is not None and memory is not None
            address = memory.array(self.array).base

        def pad(values, length):
            return [*values, *[0] * (length - len(values))]

        packed = struct.pack(
            _FORMAT,
            _MAGIC,
            address,
            len(self.dims),
            self.type,
            _SWIZZLES.index(self.swizzle),
            *pad(self.dims, 5),
            *pad(self.strides, 4),
            *pad(self.box, 5),
        )
        return packed.ljust(BYTES, b"\0")


_FIELDS = {"global_address": 1, "global_dim": 5, "global_stride": 10, "box_dim": 14}


def replace(blob: bytes, field: str, ordinal: int, value: int) -> bytes:
    """tensormap.replace (PTX ISA 9.7.9.28) on the 128 bytes of a map."""
    values = list(struct.unpack(_FORMAT, blob[: struct.calcsize(_FORMAT)]))
    if values[0] != _MAGIC:
        raise DescriptorError("tensormap.replace on bytes that are not a tensor map")
    if field not in _FIELDS:
        raise Unsupported(f"tensormap.replace of {field}")
    values[_FIELDS[field] + ordinal] = value
    return struct.pack(_FORMAT, *values).ljust(BYTES, b"\0")


@dataclass(frozen=True)
class DecodedMap:
    """A tensor map as the copy engine sees it."""

    address: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    itemsize: int
    dtype: object

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def box_bytes(self) -> int:
        return int(np.prod(self.box)) * self.itemsize

    @property
    def inner_bytes(self) -> int:
        return self.box[0] * self.itemsize

    def _window(self, base: np.ndarray, offset: int) -> np.ndarray:
        """The tensor as an array of bytes, outermost dimension first."""
        shape = (*self.dims[:0:-1], self.dims[0] * self.itemsize)
        scale = base.itemsize
        strides = (*(s * scale for s in self.strides[::-1]), scale)
        return np.lib.stride_tricks.as_strided(base[offset:], shape=shape, strides=strides)

    def region(self, memory: Memory, write: bool) -> Region:
        """The buffer under the map; the whole tensor must lie in it."""
        extent = self.dims[0] * self.itemsize
        extent += sum((d - 1) * s for d, s in zip(self.dims[1:], self.strides, strict=True))
        what = "tensor map store" if write else "tensor map load"
        find = memory.find_writable if write else memory.find
        try:
            return find(self.address, extent, what)
        except OutOfBounds as error:
            raise type(error)(
                f"{error} (the tensor map describes {extent} bytes)", offset=self.address
            ) from None

    def clip(self, coordinates: tuple[int, ...]):
        """(slices of the tensor, slices of the box) of the part that exists, or None."""
        tensor, box = [], []
        for axis, (start, size, limit) in enumerate(
            zip(coordinates, self.box, self.dims, strict=True)
        ):
            scale = self.itemsize if axis == 0 else 1
            low, high = max(start, 0), min(start + size, limit)
            if high <= low:
                return None
            tensor.append(slice(low * scale, high * scale))
            box.append(slice((low - start) * scale, (high - start) * scale))
        return tuple(tensor[::-1]), tuple(box[::-1])

    def view(self, region: Region, log: bool = False) -> np.ndarray:
        base = region.log() if log else region.bytes
        return self._window(base, self.address - region.base)

    def view_of(self, region: Region, log: np.ndarray) -> np.ndarray:
        """A log of the region's bytes, as the tensor."""
        return self._window(log, self.address - region.base)

    def load(self, memory: Memory, coordinates: tuple[int, ...]) -> np.ndarray:
        """The bytes of a box, rows packed densely; zeros outside of the tensor."""
        out = np.zeros((*self.box[:0:-1], self.inner_bytes), np.uint8)
        region = self.region(memory, write=False)
        clipped = self.clip(coordinates)
        if clipped:
            out[clipped[1]] = self.view(region)[clipped[0]]
        return out.reshape(-1)


@functools.lru_cache(maxsize=1024)
def decode(blob: bytes) -> DecodedMap:
    """The map in 128 bytes of a kernel parameter or of global memory."""
    values = struct.unpack(_FORMAT, blob[: struct.calcsize(_FORMAT)])
    if values[0] != _MAGIC:
        raise DescriptorError("these 128 bytes are not a tensor map")
    address, rank, kind, swizzle = values[1:5]
    name, itemsize, dtype = _TYPES[kind]
    result = DecodedMap(
        address,
        values[5 : 5 + rank],
        values[10 : 10 + rank - 1],
        values[14 : 14 + rank],
        _SWIZZLES[swizzle],
        itemsize,
        dtype,
    )
    if result.swizzle and result.inner_bytes != result.swizzle:
        raise Unsupported(
            f"inner box of {result.inner_bytes} bytes under a {result.swizzle}-byte swizzle: what "
            "the hardware does with the rest of the span is not documented"
        )
    return result
