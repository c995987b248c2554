"""Global memory: buffers with addresses, guard zones, and a log of who stored what."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterator

import numpy as np

from .errors import LaunchError, OutOfBounds, ReadOnlyWrite
from .order import GlobalOrder

_GUARD = 1 << 16  # bytes that belong to nobody after every buffer, unless asked for more
_ALIGN = 256  # cudaMalloc's alignment
# Addresses of buffers that do not have one of their own: below any host mapping.
_FIRST_ADDRESS = 0x0000_0200_0000_0000


class Region:
    """A buffer of global memory: `size` bytes from `base`, held in `bytes`.

    writers: for each byte, the stamp of the warp that stored it in this launch (order.py), 0 for
    none; allocated at the first store.
    readers: for each byte, 1 + the launch that read it last, of those whose dependents may overlap.
    """

    def __init__(self, base: int, data: np.ndarray, writable: bool, name: str):
        self.base, self.bytes, self.writable, self.name = base, data, writable, name
        self.size = data.size
        self.end = base + data.size
        self.writers: np.ndarray | None = None
        self.readers: np.ndarray | None = None
        self._views: dict[int, np.ndarray] = {}

    def __repr__(self):
        mode = "" if self.writable else ", read only"
        return f"{self.name} [{self.base:#x}, +{self.size}{mode}]"

    def elements(self, itemsize: int) -> np.ndarray | None:
        """The bytes as unsigned elements, or None where the size is no multiple."""
        if itemsize not in self._views:
            if self.size % itemsize:
                return None
            self._views[itemsize] = self.bytes.view(f"u{itemsize}")
        return self._views[itemsize]

    def log_readers(self) -> np.ndarray:
        if self.readers is None:
            self.readers = np.zeros(self.size, np.uint8)
        return self.readers

    def log(self) -> np.ndarray:
        if self.writers is None:
            self.writers = np.zeros(self.size, np.uint32)
        return self.writers


class Memory:
    """An address space of global memory.

    Buffers come from `map` (host memory at its own address, not copied: what a driver hands to a
    kernel), or from `array` (a NumPy array, at an address that the memory chooses). Between the
    latter lie guard zones of `guard` bytes; any access outside of every buffer is an error.
    """

    def __init__(self, guard: int = _GUARD):
        self._guard = guard
        self._bases: list[int] = []
        self._regions: list[Region] = []
        self._next = _FIRST_ADDRESS
        self._arrays: dict[tuple[int, int], Region] = {}
        self._keep: list[np.ndarray] = []
        self._made: list[Region] = []
        self.order = GlobalOrder()

    def map(self, address: int, nbytes: int, *, writable: bool = True, name: str = "") -> Region:
        """Registers `nbytes` of host memory at `address`, which stays owned by the caller.

        A buffer may be mapped again with the same extent; its permissions are then united.

        Raises:
            LaunchError: the extent overlaps a different buffer.
        """
        address, nbytes = int(address), int(nbytes)
        existing = self._overlapping(address, nbytes)
        if existing is not None:
            if (existing.base, existing.size) != (address, nbytes):
                raise LaunchError(
                    f"buffer [{address:#x}, +{nbytes}) overlaps another buffer, {existing}"
                )
            existing.writable |= writable
            return existing
        if nbytes:
            host = (ctypes.c_ubyte * nbytes).from_address(address)
            data = np.frombuffer(host, np.uint8)
        else:
            data = np.zeros(0, np.uint8)
        return self._add(Region(address, data, writable, name or f"buffer {address:#x}"))

    def unmap(self, address: int):
        """Forgets a buffer of `map`."""
        index = bisect.bisect_left(self._bases, address)
        if index == len(self._bases) or self._bases[index] != address:
            raise LaunchError(f"no buffer at {address:#x}")
        self._made.remove(self._regions[index])
        del self._bases[index], self._regions[index]

    def array(self, array: np.ndarray, *, name: str = "") -> Region:
        """Places a C-contiguous array, without a copy; writable as the array is."""
        if not array.flags.c_contiguous:
            raise LaunchError(f"{name or 'array'} is not C-contiguous")
        key = (array.ctypes.data, array.nbytes)
        if key in self._arrays:
            self._arrays[key].writable |= array.flags.writeable
            return self._arrays[key]
        data = array.reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)
        region = Region(self._next, data, array.flags.writeable, name or f"array {array.shape}")
        self._next += -(-(array.nbytes + self._guard) // _ALIGN) * _ALIGN
        self._keep.append(array)
        self._arrays[key] = region
        return self._add(region)

    def regions(self) -> Iterator[Region]:
        return iter(self._regions)

    def find(self, address: int, nbytes: int, what: str = "access") -> Region:
        """The buffer that holds [address, address + nbytes)."""
        index = bisect.bisect_right(self._bases, address) - 1
        if index >= 0:
            region = self._regions[index]
            if address < region.end:
                if address + nbytes <= region.end:
                    return region
                raise OutOfBounds(
                    f"{what} of {nbytes} bytes at global address {address:#x} runs past the end "
                    f"of {region}",
                    offset=address,
                )
        nearest = f"; nearest below: {self._regions[index]}" if index >= 0 else ""
        raise OutOfBounds(
            f"{what} of {nbytes} bytes at global address {address:#x} is in no buffer{nearest}",
            offset=address,
        )

    def find_writable(self, address: int, nbytes: int, what: str = "store") -> Region:
        region = self.find(address, nbytes, what)
        if not region.writable:
            raise ReadOnlyWrite(f"{what} at {address:#x} to {region}", offset=address)
        return region

    def forget_stores(self):
        """Starts a launch: no byte has been stored yet."""
        self.order = GlobalOrder()
        for region in self._regions:
            region.writers = region.readers = None

    def snapshot(self) -> list[np.ndarray]:
        """The bytes of every buffer that can be stored to, in the order of their making."""
        return [r.bytes.copy() for r in self._made if r.writable]

    def restore(self, bytes_: list[np.ndarray]):
        """Puts the bytes of an earlier snapshot back."""
        for region, data in zip((r for r in self._made if r.writable), bytes_, strict=False):
            region.bytes[:] = data

    def _overlapping(self, address: int, nbytes: int) -> Region | None:
        index = bisect.bisect_right(self._bases, address) - 1
        for region in self._regions[max(index, 0) : index + 2]:
            if region.base == address and region.size == nbytes:
                return region
            if address < region.end and region.base < address + nbytes:
                return region
        return None

    def _add(self, region: Region) -> Region:
        index = bisect.bisect_left(self._bases, region.base)
        self._bases.insert(index, region.base)
        self._regions.insert(index, region)
        self._made.append(region)
        return region
