"""FP8 checkpoints as they are published (Qwen3-FP8, DeepSeek-V3 and their kin), read and written.

    params = jaxfp8.safetensors.load("Qwen3-8B-FP8")     # {"model.layers.0.mlp.up_proj.weight": QuantizedArray, ...}
    y = jaxfp8.linear(x, params["model.layers.0.mlp.up_proj.weight"])
    jaxfp8.safetensors.save(params, "copy")

The layout: tensors in the safetensors format, in one file or in several with `model.safetensors.index.json`. A weight
`X.weight` is F8_E4M3 `(N, K)`, or `(G, N, K)`; its scales are `X.weight_scale_inv`, `(ceil(N/128), ceil(K/128))`, F32,
BF16 or F8_E8M0. They multiply, whatever their name says. Other tensors are what they are. `config.json` beside the
files says so in `quantization_config`.

Headers are read and files written by the library `safetensors`; it knows no FP8 arrays, so bytes are mapped here.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from ._arrays.blocks import BLOCK, SQUARE, ceil_blocks
from ._arrays.quantized_array import QuantizedArray, quantized
from ._primitives.mesh import full_spec, to_spec

__all__ = ["load", "save"]

SCALE_SUFFIX = "_scale_inv"
SUFFIX = ".safetensors"
SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
DEFAULT_SHARD_BYTES = 5_000_000_000

FP8, E8M0 = "F8_E4M3", "F8_E8M0"
SCALE_DTYPES = ("F32", "BF16", E8M0)
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "I8": np.int8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
        "U8": np.uint8,
        "U16": np.uint16,
        "U32": np.uint32,
        "U64": np.uint64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        FP8: ml_dtypes.float8_e4m3fn,
        E8M0: ml_dtypes.float8_e8m0fnu,
    }.items()
}
"""Element types that are read and written, by their names in the files; FP8 ones only as weights with scales."""

Placement = Sharding | Callable[[str, tuple[int, ...]], Sharding | None] | None


# --------------------------------------------------------------------------------------------------
# What the files say
# --------------------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """A tensor in a file: its bytes begin at `offset`."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def _header(file: pathlib.Path) -> dict[str, _Stored]:
    """The tensors of a file, in the order of their bytes, which the format packs without gaps."""
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            described = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        with open(file, "rb") as raw:
            offset = 8 + int.from_bytes(raw.read(8), "little")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load: {file} is not a whole safetensors file: {error}") from error
    found = {}
    for name, (dtype, shape) in described.items():
        if dtype not in DTYPES:
            raise ValueError(
                f"load: {name} in {file} has dtype {dtype}; allowed: {', '.join(DTYPES)}"
            )
        found[name] = _Stored(file, dtype, shape, offset)
        offset += int(np.prod(shape, dtype=object)) * DTYPES[dtype].itemsize
    return found


def _json(function: str, file: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{function}: {file} is not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{function}: {file} holds a {type(value).__name__}; allowed: a JSON object"
        )
    return value


def _indexed(index: pathlib.Path) -> dict[str, _Stored]:
    """The tensors that an index names, each in the file where it must be."""
    names = _json("load", index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"load: {index} has no weight_map; allowed: names of tensors to files")
    files: dict[str, dict[str, _Stored]] = {}
    found = {}
    for name, file in names.items():
        inside = isinstance(file, str) and file == os.path.basename(file) and "\\" not in file
        if not inside or not file.endswith(SUFFIX):
            raise ValueError(
                f"load: {index} has {name} in {file!r}; allowed: the name of a {SUFFIX} file beside the index"
            )
        if file not in files:
            if not (index.parent / file).is_file():
                raise ValueError(f"load: {index} has {name} in {file}, which is not there")
            files[file] = _header(index.parent / file)
        if name not in files[file]:
            raise ValueError(f"load: {index} has {name} in {file}, which holds no such tensor")
        found[name] = files[file][name]
    return found


def _tensors(path: pathlib.Path) -> dict[str, _Stored]:
    """The tensors of a checkpoint: a file, an index, or a folder with either."""
    if path.is_dir():
        both = [path / name for name in (INDEX, SINGLE) if (path / name).is_file()]
        if len(both) == 2:
            raise ValueError(
                f"load: {path} holds {INDEX} and {SINGLE}; name the one that is the checkpoint"
            )
        single = both or sorted(path.glob(f"*{SUFFIX}"))
        if len(single) != 1:
            raise ValueError(
                f"load: {path} holds {len(single)} {SUFFIX} files and no {INDEX}; allowed: an index, or one file"
            )
        path = single[0]
    if not path.exists():
        raise FileNotFoundError(f"load: there is nothing at {path}")
    if path.name.endswith(".index.json"):
        return _indexed(path)
    if not path.name.endswith(SUFFIX):
        raise ValueError(
            f"load: path is {path}; allowed: a folder, a {SUFFIX} file or an index, *.index.json"
        )
    return _header(path)


_QUANTIZATION = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "weight_block_size": ([BLOCK, BLOCK],),
    "activation_scheme": ("dynamic", None),
    "scale_fmt": ("ue8m0", "float", None),
}
"""What `quantization_config` may say; None: nothing."""


def _check_config(folder: pathlib.Path, tensors: dict[str, _Stored]) -> None:
    """config.json, if there is one, describes this layout."""
    if not (folder / CONFIG).is_file():
        return
    said = _json("load", folder / CONFIG).get("quantization_config")
    if said is None:
        return
    where = f"load: {folder / CONFIG} has quantization_config"
    if not isinstance(said, dict):
        raise ValueError(f"{where} of type {type(said).__name__}; allowed: a JSON object")
    for key, allowed in _QUANTIZATION.items():
        if said.get(key) not in allowed:
            choices = " or ".join("none" if a is None else repr(a) for a in allowed)
            raise ValueError(f"{where} with {key} {said.get(key)!r}; allowed: {choices}")
    wide = said.get("modules_to_not_convert")
    if not (wide is None or isinstance(wide, list) and all(isinstance(m, str) for m in wide)):
        raise ValueError(f"{where} with modules_to_not_convert {wide!r}; allowed: a list of names")
    for module in wide or ():
        weight = tensors.get(f"{module}.weight")
        if weight is not None and weight.dtype == FP8:
            raise ValueError(
                f"{where} with {module} in modules_to_not_convert, but {module}.weight is {FP8}"
            )


def _scales_of(tensors: dict[str, _Stored]) -> dict[str, str]:
    """The name of each FP8 weight's scales. Whatever is FP8, and whatever is called a scale, is in a pair that fits."""
    for name, stored in tensors.items():
        scaled = name.removesuffix(SCALE_SUFFIX)
        if scaled != name and (scaled not in tensors or scaled.endswith(SCALE_SUFFIX)):
            what = "scales as well" if scaled in tensors else "not there"
            raise ValueError(f"load: {name} in {stored.file} scales {scaled}, which is {what}")
        dtype = DTYPES[stored.dtype]
        if dtype.itemsize == 8 and jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"load: {name} in {stored.file} is {stored.dtype}, which JAX holds with jax_enable_x64 alone"
            )
    pairs = {}
    for name, stored in tensors.items():
        scale = tensors.get(name + SCALE_SUFFIX)
        if name.endswith(SCALE_SUFFIX):
            continue
        if stored.dtype == E8M0 or (stored.dtype == FP8) != (scale is not None):
            need = f"scales {name + SCALE_SUFFIX} with a weight of {FP8}"
            got = "no such tensor" if scale is None else "that tensor"
            raise ValueError(
                f"load: {name} in {stored.file} is {stored.dtype}, with {got}; allowed: {need}, or neither"
            )
        if scale is not None:
            _check_pair(name, stored, scale)
            pairs[name] = name + SCALE_SUFFIX
    return pairs


def _check_pair(name: str, weight: _Stored, scale: _Stored) -> None:
    if len(weight.shape) < 2:
        raise ValueError(f"load: {name} has shape {weight.shape}; allowed: (N, K) or (G, N, K)")
    if scale.dtype not in SCALE_DTYPES:
        raise ValueError(
            f"load: {name + SCALE_SUFFIX} in {scale.file} has dtype {scale.dtype}; allowed: {', '.join(SCALE_DTYPES)}"
        )
    want = _scale_shape(weight.shape)
    if scale.shape != want:
        raise ValueError(
            f"load: {name + SCALE_SUFFIX} in {scale.file} has shape {scale.shape}; allowed: {want}, "
            f"blocks of {BLOCK}x{BLOCK} of {name} {weight.shape}"
        )


def _scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], ceil_blocks(shape[-2]), ceil_blocks(shape[-1]))


# --------------------------------------------------------------------------------------------------
# Arrays from the files
# --------------------------------------------------------------------------------------------------


class _Bytes:
    """The bytes of the files, mapped into memory."""

    def __init__(self) -> None:
        self.maps: dict[pathlib.Path, mmap.mmap] = {}

    def view(self, stored: _Stored) -> np.ndarray:
        """The tensor in the file itself."""
        dtype, count = DTYPES[stored.dtype], int(np.prod(stored.shape))
        if not count:
            return np.empty(stored.shape, dtype)
        if stored.file not in self.maps:
            with open(stored.file, "rb") as file:
                self.maps[stored.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = np.frombuffer(
            self.maps[stored.file], np.uint8, count * dtype.itemsize, stored.offset
        )
        return view.view(dtype).reshape(stored.shape)

    def release(self, stored: _Stored) -> None:
        """Pages that were read need no memory any more."""
        if stored.file in self.maps and hasattr(mmap, "MADV_DONTNEED"):
            self.maps[stored.file].madvise(mmap.MADV_DONTNEED)


def _sharding_of(name: str, shape: tuple[int, ...], sharding: Placement) -> Sharding | None:
    """Where a tensor goes; None is the default device."""
    if sharding is not None and not isinstance(sharding, Sharding):
        if not callable(sharding):
            raise TypeError(
                f"load: sharding is a {type(sharding).__name__}; allowed: a jax.sharding.Sharding, "
                "a function (name, shape) -> Sharding or None, or None"
            )
        sharding = sharding(name, shape)
        if sharding is not None and not isinstance(sharding, Sharding):
            raise TypeError(
                f"load: sharding of {name} is a {type(sharding).__name__}; allowed: a Sharding or None"
            )
    if sharding is not None:
        try:
            if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):
                raise ValueError(f"{sharding.spec} names more axes than it has")
            sharding.shard_shape(shape)
        except ValueError as error:
            raise ValueError(
                f"load: sharding of {name} {shape} does not fit it: {error}"
            ) from error
    return sharding


def _scale_sharding(name: str, shape: tuple[int, ...], sharding: Sharding | None):
    """The scales lie beside the blocks that they scale, but where a shard cuts blocks: there, on all."""
    if sharding is None or isinstance(sharding, SingleDeviceSharding):
        return sharding
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"load: sharding of {name}, an FP8 weight, is a {type(sharding).__name__}; allowed: a NamedSharding or a "
            "SingleDeviceSharding"
        )
    shard = sharding.shard_shape(shape)
    axes = list(full_spec(sharding.spec, len(shape)))
    for a in (-2, -1):
        if shard[a] != shape[a] and shard[a] % BLOCK:
            axes[a] = ()
    return NamedSharding(sharding.mesh, to_spec(axes), memory_kind=sharding.memory_kind)


def _place(view: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """A copy on the devices, of which each reads its own part; never an alias of the file."""
    if sharding is None:
        array = jnp.array(view)
    else:
        array = jax.make_array_from_callback(
            view.shape, sharding, lambda index: np.array(view[index])
        )
    return array.block_until_ready()


def load(
    path: str | os.PathLike[str], *, sharding: Placement = None
) -> dict[str, jax.Array | QuantizedArray]:
    """The tensors of a safetensors checkpoint, FP8 weights as quantized arrays.

    Everything is checked before the first tensor is read. Files are mapped into memory and read a tensor at a time (of
    a sharded one, each device's part), so that the peak is one tensor above the result.

    **Arguments:**

    - `path`: a `.safetensors` file, an index of several, or a folder with either. The quantization that `config.json`
      beside it describes must be this one; without it the tensors speak for themselves.
    - `sharding`: a `jax.sharding.Sharding` for all, a function `(name, shape) -> Sharding or None`, or None, the
      default device. An FP8 weight's scales are cut as it is, where its shards are whole blocks of 128.

    **Returns:** the tensors by name: `X.weight` with its scales as one `QuantizedArray` `(N, K)` or `(G, N, K)` in
    128x128 blocks, its scales in float32; others as arrays of their own dtype.

    **Raises:** FileNotFoundError if nothing is at `path`. ValueError, which names file and tensor, for files that are
    cut off or malformed, an index that names what is not beside it, another quantization, FP8 without scales, scales of
    another shape or dtype, a sharding that does not fit. TypeError for a sharding that is none.
    """
    path = pathlib.Path(path)
    tensors = _tensors(path)
    _check_config(path if path.is_dir() else path.parent, tensors)
    pairs = _scales_of(tensors)
    names = [n for n in tensors if not n.endswith(SCALE_SUFFIX)]
    where = {n: _sharding_of(n, tensors[n].shape, sharding) for n in names}
    of_scales = {n: _scale_sharding(n, tensors[n].shape, where[n]) for n in pairs}
    data, result = _Bytes(), {}
    for name in names:
        array: Any = _place(data.view(tensors[name]), where[name])
        data.release(tensors[name])
        if name in pairs:
            scale = data.view(tensors[pairs[name]]).astype(np.float32)
            array = QuantizedArray(array, _place(scale, of_scales[name]), SQUARE)
        result[name] = array
    return result


# --------------------------------------------------------------------------------------------------
# Files from arrays
# --------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A tensor to write: an array, and the dtype to write it in."""

    name: str
    array: Any
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return self.array.size * self.dtype.itemsize


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: x is None or isinstance(x, QuantizedArray)
    )[0]
    named: dict[str, Any] = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in ("", "__metadata__") or name in named:
            raise ValueError(
                f"save: tree has {name!r} more than once, or as a name that no file holds"
            )
        named[name] = leaf
    if not named:
        raise ValueError("save: tree has no array; allowed: at least one")
    return named


def _pieces(name: str, leaf: Any, scale_dtype: np.dtype) -> list[_Piece]:
    """What is written of a leaf: one tensor, or an FP8 weight and its scales."""
    if isinstance(leaf, QuantizedArray):
        q = quantized("save", name, leaf, "(..., N, K)", (SQUARE,))
        if q.dtype != DTYPES[FP8]:
            raise TypeError(f"save: {name} has dtype {q.dtype.name}; allowed: {DTYPES[FP8].name}")
        scale = np.asarray(q.scale)
        with np.errstate(invalid="ignore"):
            back = scale.astype(scale_dtype).astype(np.float32)
        if not np.array_equal(scale, back, equal_nan=True):
            raise ValueError(
                f"save: {name} has scales that {scale_dtype.name} does not hold; allowed: scale_dtype=float32"
            )
        pair = _Piece(name, q.data, q.dtype), _Piece(name + SCALE_SUFFIX, scale, scale_dtype)
        return list(pair)
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(
            f"save: {name} is a {type(leaf).__name__}; allowed: an array, or a QuantizedArray"
        )
    wide = [d for n, d in DTYPES.items() if n not in (FP8, E8M0)]
    if leaf.dtype not in wide:
        raise TypeError(
            f"save: {name} has dtype {leaf.dtype}; allowed: {', '.join(d.name for d in wide)}, or a QuantizedArray"
        )
    return [_Piece(name, leaf, np.dtype(leaf.dtype))]


def _check_addressable(pieces: list[_Piece]) -> None:
    for piece in pieces:
        if not getattr(piece.array, "is_fully_addressable", True):
            raise ValueError(
                f"save: {piece.name} has shards on devices of other processes; allowed: an array that is all here"
            )


def _write(file: pathlib.Path, pieces: list[_Piece]) -> None:
    arrays = {p.name: np.ascontiguousarray(np.asarray(p.array, p.dtype)) for p in pieces}
    specs = {
        name: TensorSpec(
            dtype=a.dtype.name,
            shape=pieces[i].array.shape,
            data_ptr=a.ctypes.data,
            data_len=a.nbytes,
        )
        for i, (name, a) in enumerate(arrays.items())
    }
    # "pt" is what readers ask for: dimensions are in PyTorch's order, (out, in).
    serialize_file(specs, file, {"format": "pt"})


def _shards(leaves: list[list[_Piece]], limit: int) -> list[list[_Piece]]:
    """Files of at most `limit` bytes, in the tree's order; a larger leaf has one for itself."""
    shards: list[list[_Piece]] = [[]]
    size = 0
    for pieces in leaves:
        more = sum(p.nbytes for p in pieces)
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1] += pieces
        size += more
    return shards


def _quantization_config(named: dict[str, Any]) -> dict[str, Any] | None:
    """What readers of `config.json` are told; None if nothing is in FP8."""
    scales = [np.asarray(x.scale) for x in named.values() if isinstance(x, QuantizedArray)]
    if not scales:
        return None
    wide = [
        name.removesuffix(".weight")
        for name, x in named.items()
        if name.endswith(".weight") and not isinstance(x, QuantizedArray) and x.ndim >= 2
    ]
    said = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": wide,
    }
    if all(np.all(s.view(np.uint32) & 0x007FFFFF == 0) for s in scales):
        said["scale_fmt"] = "ue8m0"
    return said


def _config_text(folder: pathlib.Path, config: Any, named: dict[str, Any]) -> str | None:
    """`config`, or what the folder's config.json says, with this quantization; None if there is nothing to say."""
    if config is None and (folder / CONFIG).is_file():
        config = _json("save", folder / CONFIG)
    said = {k: v for k, v in (config or {}).items() if k != "quantization_config"}
    if quantization := _quantization_config(named):
        said["quantization_config"] = quantization
    if config is None and not said:
        return None
    try:
        return json.dumps(said, indent=2)
    except (TypeError, ValueError) as error:
        raise TypeError(f"save: config is not JSON: {error}") from error


def _replace_all(written: Mapping[pathlib.Path, pathlib.Path]) -> None:
    for temporary, final in written.items():
        os.replace(temporary, final)


def _save_folder(folder, named, leaves, limit: int, config) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(leaves, limit)
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}{SUFFIX}" for i in range(count)]
    names = [SINGLE] if count == 1 else names
    text = _config_text(folder, config, named)
    texts = {} if text is None else {CONFIG: text}
    if count > 1:
        total = sum(p.nbytes for pieces in leaves for p in pieces)
        place = {p.name: n for n, pieces in zip(names, shards, strict=True) for p in pieces}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        texts[INDEX] = json.dumps(index, indent=2)
    with _temporary(folder, [*names, *texts]) as written:
        temporaries = {final.name: temporary for temporary, final in written.items()}
        for name, pieces in zip(names, shards, strict=True):
            _write(temporaries[name], pieces)
        for name, text in texts.items():
            temporaries[name].write_text(text + "\n", encoding="utf-8")
        # The other form of an earlier checkpoint here would contradict this one.
        (folder / (SINGLE if count > 1 else INDEX)).unlink(missing_ok=True)
        _replace_all(written)


@contextlib.contextmanager
def _temporary(folder: pathlib.Path, names: list[str]):
    """Names to write under until all is written, by the names that they will have."""
    written = {folder / f".{name}.{os.getpid()}.partial": folder / name for name in names}
    try:
        yield written
    finally:
        for temporary in written:
            temporary.unlink(missing_ok=True)


def save(
    tree: Any,
    path: str | os.PathLike[str],
    *,
    max_shard_bytes: int | None = None,
    scale_dtype: Any = jnp.float32,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes arrays and FP8 weights as a safetensors checkpoint that `load` and other libraries read.

    Files appear under their names only when all are written. A checkpoint that is there is replaced. In memory is one
    file at a time, of arrays that are not on the host already.

    **Arguments:**

    - `tree`: what `load` returns, or any pytree of arrays and `QuantizedArray`s `(..., N, K)` in 128x128 blocks of
      float8_e4m3fn. Keys of nested ones are joined by dots.
    - `path`: a folder, for `model.safetensors` or `model-00001-of-0000N.safetensors` with their index, and
      `config.json`; or a `.safetensors` file, for all tensors and nothing else.
    - `max_shard_bytes`: of a folder: the largest file, of bytes of tensors; None is 5 GB. A larger tensor has a file
      for itself.
    - `scale_dtype`: float32, bfloat16 or float8_e8m0fnu; only if it holds every scale exactly.
    - `config`: of a folder: what `config.json` shall say besides `quantization_config`, which is written from `tree`;
      None keeps what is there.

    **Raises:** TypeError or ValueError, which names the leaf, for what the layout does not hold.
    """
    path = pathlib.Path(path)
    scale_dtype = _scale_dtype(scale_dtype)
    named = _named_leaves(tree)
    leaves = [_pieces(name, leaf, scale_dtype) for name, leaf in named.items()]
    pieces = [p for of_leaf in leaves for p in of_leaf]
    _check_addressable(pieces)
    if names := {p.name for p in pieces if p.name.endswith(SCALE_SUFFIX)} & named.keys():
        raise ValueError(
            f"save: tree has {min(names)}; allowed: scales inside of their QuantizedArray alone"
        )
    is_file = path.name.endswith(SUFFIX)
    if is_file and (max_shard_bytes is not None or config is not None):
        raise ValueError(f"save: path is {path}; allowed with max_shard_bytes or config: a folder")
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(f"save: config is a {type(config).__name__}; allowed: a mapping, or None")
    limit = DEFAULT_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes
    if isinstance(limit, bool) or not isinstance(limit, (int, np.integer)) or limit < 1:
        raise ValueError(f"save: max_shard_bytes is {max_shard_bytes!r}; allowed: 1 or more")
    if not is_file:
        _save_folder(path, named, leaves, int(limit), config)
        return
    with _temporary(path.parent, [path.name]) as written:
        _write(next(iter(written)), pieces)
        _replace_all(written)


def _scale_dtype(dtype: Any) -> np.dtype:
    allowed = [DTYPES[name] for name in SCALE_DTYPES]
    try:
        found = np.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found not in allowed:
        raise TypeError(
            f"save: scale_dtype is {dtype!r}; allowed: {', '.join(d.name for d in allowed)}"
        )
    return found
