"""The safetensors format by hand, for whole files and broken ones: eight bytes of length, a JSON header, bytes."""

import json

import ml_dtypes
import numpy as np

NAMES = {
    "bool": "BOOL",
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}
E4M3, E5M2, E8M0, BF16 = (
    np.dtype(getattr(ml_dtypes, n))
    for n in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "bfloat16")
)


def header_of(tensors):
    header, offset = {}, 0
    for name, x in tensors.items():
        end = offset + x.nbytes
        header[name] = {
            "dtype": NAMES[x.dtype.name],
            "shape": list(x.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    return header


def data_of(tensors):
    return b"".join(x.tobytes() for x in tensors.values())


def pack(header, data=b"", length=None):
    """A file of this header, a dict or bytes; `length`: what it says of the header's."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def write(path, tensors):
    path.write_bytes(pack(header_of(tensors), data_of(tensors)))


def read(path):
    """The tensors of a whole file, as NumPy arrays."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    dtypes = {v: getattr(ml_dtypes, k, None) or np.dtype(k) for k, v in NAMES.items()}
    return {
        name: np.frombuffer(raw[start:][slice(*t["data_offsets"])], dtypes[t["dtype"]]).reshape(
            t["shape"]
        )
        for name, t in header.items()
    }
