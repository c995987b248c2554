"""Published FP8 checkpoints: what files hold is what is loaded, to the bit; what is malformed is refused by name."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxfp8
import jaxfp8.safetensors
from tests import oracle, programs
from tests import raw_safetensors as raw
from tests.raw_safetensors import BF16, E4M3, E5M2, E8M0

load, save = jaxfp8.safetensors.load, jaxfp8.safetensors.save
RANDOM = np.random.default_rng(27)


def weight(n=200, k=300, scale_dtype=np.float32, groups=()):
    """FP8 data of every finite bit pattern, and scales that any of the three dtypes holds."""
    codes = RANDOM.integers(0, 256, (*groups, n, k), np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    blocks = (*groups, -(-n // 128), -(-k // 128))
    scales = (2.0 ** RANDOM.integers(-20, 20, blocks)).astype(scale_dtype)
    return codes.view(E4M3), scales


def pair(name="a", *arguments, **options):
    data, scale = weight(*arguments, **options)
    return {f"{name}.weight": data, f"{name}.weight_scale_inv": scale}


def assert_holds(loaded, tensors):
    """`loaded` has each tensor of the files, FP8 ones with their scales in float32, and nothing else."""
    scales = {n for n in tensors if n.endswith("_scale_inv")}
    assert loaded.keys() == tensors.keys() - scales
    for name, got in loaded.items():
        if name + "_scale_inv" in tensors:
            assert got.block == (128, 128)
            want = tensors[name], tensors[name + "_scale_inv"].astype(np.float32)
            programs.assert_same_bits((got.data, got.scale), want)
        else:
            programs.assert_same_bits(got, tensors[name])


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", [np.float32, BF16, E8M0], ids=lambda d: np.dtype(d).name)
def test_a_file_is_loaded_to_the_bit(tmp_path, scale_dtype):
    tensors = {
        **pair("odd", 200, 300, scale_dtype),
        **pair("experts", 130, 128, scale_dtype, groups=(3,)),
        "one.weight": weight(1, 1)[0],
        "one.weight_scale_inv": np.full((1, 1), 0.5, scale_dtype),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(3).reshape(()),
        "norm.weight": RANDOM.normal(size=7).astype(BF16),
        "mask": np.array([True, False, True]),
        "ids": np.arange(5, dtype=np.int32),
        "half.bias": RANDOM.normal(size=(3, 5)).astype(np.float16),
    }
    raw.write(tmp_path / "x.safetensors", tensors)
    assert_holds(load(tmp_path / "x.safetensors"), tensors)
    assert_holds(load(str(tmp_path)), tensors)


def write_two(folder, first, second):
    """Two files with an index; the scales of a weight may lie in the other file."""
    raw.write(folder / "model-00001-of-00002.safetensors", first)
    raw.write(folder / "model-00002-of-00002.safetensors", second)
    where = {n: "model-00001-of-00002.safetensors" for n in first}
    where |= {n: "model-00002-of-00002.safetensors" for n in second}
    write_index(folder, where)
    return where


def write_index(folder, where):
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_several_files_are_one_checkpoint_and_scales_may_lie_in_another(tmp_path):
    tensors = pair("a") | pair("b", 64, 64)
    items = list(tensors.items())
    write_two(tmp_path, dict(items[::2]), dict(items[1::2]))
    assert_holds(load(tmp_path), tensors)
    assert_holds(load(tmp_path / "model.safetensors.index.json"), tensors)


def test_files_may_be_links_as_download_caches_have_them(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    tensors = pair()
    raw.write(tmp_path / "blobs" / "cafe", tensors)
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/cafe")
    assert_holds(load(tmp_path / "snapshot"), tensors)


def test_what_is_loaded_outlives_the_file(tmp_path):
    tensors = {"x": np.arange(4096, dtype=np.float32), **pair()}
    raw.write(tmp_path / "x.safetensors", tensors)
    loaded = load(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert_holds(loaded, tensors)


def test_wide_integers_and_floats_are_loaded_where_jax_holds_them(tmp_path):
    tensors = {"ids": np.array([2**40]), "x": np.array([1 / 3])}
    raw.write(tmp_path / "x.safetensors", tensors)
    with jax.enable_x64(True):
        assert_holds(load(tmp_path / "x.safetensors"), tensors)


def test_a_loaded_weight_multiplies_as_its_numbers_say(tmp_path):
    data, scale = weight(200, 300, BF16)
    raw.write(
        tmp_path / "x.safetensors", {"w.weight": data, "w.weight_scale_inv": scale.astype(BF16)}
    )
    w = load(tmp_path / "x.safetensors")["w.weight"]
    x = jaxfp8.quantize(RANDOM.normal(size=(5, 300)).astype(np.float32))
    spread = np.repeat(np.repeat(scale.astype(np.float64), 128, 0), 128, 1)[:200, :300]
    want = oracle.dequantize(x) @ (data.astype(np.float64) * spread).T
    got = jaxfp8.gemm(x, w, out_dtype=jnp.float32)
    assert oracle.error(got, want) < 2e-6


@pytest.mark.full
def test_loading_takes_one_tensor_more_than_the_result(tmp_path):
    """Peak resident memory of a process that loads 24 tensors of 16 MiB."""
    tensors = {f"{i}.weight": np.full((2048, 2048), i, np.float32) for i in range(24)}
    raw.write(tmp_path / "x.safetensors", tensors)
    program = f"""
import resource, jax, jax.numpy as jnp, jaxfp8.safetensors
jnp.ones(4).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loaded = jaxfp8.safetensors.load({str(tmp_path)!r})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    assert int(done.stdout) <= (24 + 2.5) * 2**24  # a copy on its way to JAX, the mapped pages


# ------------------------------------------------------------------------------------------------
# Onto meshes
# ------------------------------------------------------------------------------------------------


def mesh():
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))


@pytest.mark.parametrize("spec", [P(), P("a"), P("a", "b"), P(None, ("a", "b")), P("b", None)])
@pytest.mark.parametrize("shape", [(512, 512), (512, 256), (200, 304)])
def test_a_sharded_weight_has_its_parts_where_they_belong(tmp_path, spec, shape):
    tensors = pair("a", *shape)
    raw.write(tmp_path / "x.safetensors", tensors)
    sharding = NamedSharding(mesh(), spec)
    loaded = load(tmp_path, sharding=sharding)
    assert_holds(loaded, tensors)
    q = loaded["a.weight"]
    assert q.data.sharding.is_equivalent_to(sharding, 2)
    for shard, scale in zip(q.data.addressable_shards, q.scale.addressable_shards, strict=True):
        assert shard.device == scale.device
        for axis in range(2):  # whole blocks go with their scales, others with all scales
            whole = shard.data.shape[axis] % 128 == 0
            want = shard.data.shape[axis] // 128 if whole else q.scale.shape[axis]
            assert scale.data.shape[axis] == want


def test_a_function_of_name_and_shape_says_where_each_tensor_goes(tmp_path):
    tensors = pair("a", 256, 256) | {"norm.weight": np.ones(6, np.float32)}
    raw.write(tmp_path / "x.safetensors", tensors)
    device = SingleDeviceSharding(jax.devices()[3])
    cut = NamedSharding(mesh(), P("a", None))
    seen = {}

    def place(name, shape):
        seen[name] = shape
        return cut if len(shape) == 2 else device

    loaded = load(tmp_path, sharding=place)
    assert seen == {"a.weight": (256, 256), "norm.weight": (6,)}
    assert loaded["norm.weight"].devices() == {jax.devices()[3]}
    assert loaded["a.weight"].scale.sharding.is_equivalent_to(cut, 2)
    assert_holds(loaded, tensors)
    assert_holds(load(tmp_path, sharding=lambda name, shape: None), tensors)
    assert_holds(load(tmp_path, sharding=device), tensors)


# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------


def quantized(shape, **options):
    x = RANDOM.normal(size=shape).astype(np.float32)
    return jaxfp8.quantize(x, (128, 128), **options)


def model(**options):
    return {
        "model.embed_tokens.weight": jnp.ones((9, 4), jnp.bfloat16),
        "model.layers.0.mlp.up_proj.weight": quantized((200, 300), **options),
        "model.layers.0.mlp.down_proj.weight": quantized((300, 200), **options),
        "model.layers.0.mlp.experts.weight": quantized((2, 130, 129), **options),
        "model.norm.weight": jnp.ones(4, jnp.float32),
    }


@pytest.mark.parametrize("limit", [None, 1, 70_000])
@pytest.mark.parametrize("scale_format", ["float32", "pow2"])
def test_what_is_saved_is_loaded_to_the_bit(tmp_path, limit, scale_format):
    tree = model(scale_format=scale_format)
    save(tree, tmp_path / "new" / "folder", max_shard_bytes=limit)
    loaded = load(tmp_path / "new" / "folder")
    assert loaded.keys() == tree.keys()
    for name, want in tree.items():
        programs.assert_same_bits(loaded[name], want)
    files = sorted((tmp_path / "new" / "folder").glob("*.safetensors"))
    assert len(files) == {None: 1, 1: 5, 70_000: 3}[limit]
    assert not list((tmp_path / "new" / "folder").glob(".*"))  # nothing temporary is left


def test_the_files_say_what_the_format_asks_for(tmp_path):
    tree = model(scale_format="pow2")
    save(tree, tmp_path, config={"model_type": "llama"})
    tensors = raw.read(tmp_path / "model.safetensors")
    for name, want in tree.items():
        if isinstance(want, jaxfp8.QuantizedArray):
            programs.assert_same_bits((tensors[name], tensors[name + "_scale_inv"]), want)
        else:
            programs.assert_same_bits(tensors[name], want)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "model_type": "llama",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
            "modules_to_not_convert": ["model.embed_tokens"],
            "scale_fmt": "ue8m0",
        },
    }


@pytest.mark.parametrize("scale_dtype", [jnp.bfloat16, jnp.float8_e8m0fnu])
def test_narrow_scales_are_written_where_they_hold_all(tmp_path, scale_dtype):
    tree = model(scale_format="pow2")
    save(tree, tmp_path / "x.safetensors", scale_dtype=scale_dtype)
    stored = raw.read(tmp_path / "x.safetensors")["model.layers.0.mlp.up_proj.weight_scale_inv"]
    assert stored.dtype == scale_dtype
    programs.assert_same_bits(load(tmp_path / "x.safetensors"), tree)
    with pytest.raises(ValueError, match="weight has scales that .* does not hold"):
        save(model(), tmp_path / "y.safetensors", scale_dtype=scale_dtype)
    assert not (tmp_path / "y.safetensors").exists()


def test_blocks_that_are_not_finite_are_kept(tmp_path):
    x = np.ones((256, 128), np.float32)
    x[3, 5] = np.nan
    q = jaxfp8.quantize(x, (128, 128))
    save({"w.weight": q}, tmp_path)
    programs.assert_same_bits(load(tmp_path)["w.weight"], q)


def test_nested_trees_and_numpy_arrays_are_saved_by_dotted_names(tmp_path):
    q = jax.tree.map(np.asarray, quantized((8, 8)))
    save({"layers": [{"q": {"weight": q}}, {"ids": np.arange(3)}]}, tmp_path / "x.safetensors")
    assert raw.read(tmp_path / "x.safetensors").keys() == {
        "layers.0.q.weight",
        "layers.0.q.weight_scale_inv",
        "layers.1.ids",
    }


def test_a_sharded_weight_is_saved_whole(tmp_path):
    q = quantized((512, 256))
    cut = jax.device_put(q, NamedSharding(mesh(), P("a", "b")))
    save({"w.weight": cut}, tmp_path)
    programs.assert_same_bits(load(tmp_path)["w.weight"], q)


def test_a_checkpoint_that_is_there_is_replaced_in_either_form(tmp_path):
    for limit in (1, None, 1):
        tree = model()
        save(tree, tmp_path, max_shard_bytes=limit, config={"vocab_size": 9})
        programs.assert_same_bits(load(tmp_path), tree)
    save({"x": jnp.ones(3)}, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"vocab_size": 9}


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    tree = model()
    save(tree, tmp_path, max_shard_bytes=1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    written = []
    serialize = jaxfp8.safetensors.serialize_file

    def fail_at_the_third(*arguments):
        written.append(arguments)
        if len(written) == 3:
            raise OSError("no space left on device")
        return serialize(*arguments)

    monkeypatch.setattr(jaxfp8.safetensors, "serialize_file", fail_at_the_third)
    with pytest.raises(OSError, match="no space"):
        save(model(), tmp_path, max_shard_bytes=1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


KEY = jax.random.key(0)
NOT_SAVED = {
    "no array": ({}, {}, ValueError, "tree has no array"),
    "a list": ({"a": ["text"]}, {}, TypeError, "a.0 is a str; allowed: an array"),
    "None": ({"a": None}, {}, TypeError, "a is a NoneType"),
    "a number": ({"a": 1.0}, {}, TypeError, "a is a float"),
    "a bare array": (jnp.ones(3), {}, ValueError, "tree has ''"),
    "one name twice": (
        {"a": {"b": jnp.ones(3)}, "a.b": jnp.ones(3)},
        {},
        ValueError,
        "tree has 'a.b' more than once",
    ),
    "metadata": ({"__metadata__": jnp.ones(3)}, {}, ValueError, "'__metadata__'"),
    "FP8 alone": (
        {"a": jnp.ones((3, 3), jnp.float8_e4m3fn)},
        {},
        TypeError,
        "a has dtype float8_e4m3fn; allowed: .* or a QuantizedArray",
    ),
    "four bits": ({"a": jnp.ones(4, jnp.int4)}, {}, TypeError, "a has dtype int4"),
    "a key": ({"a": KEY}, {}, TypeError, "a has dtype key"),
    "rows": (
        {"a.weight": jaxfp8.quantize(jnp.ones((4, 128)))},
        {},
        ValueError,
        "a.weight has blocks of 1x128; allowed: 128x128",
    ),
    "E5M2": (
        {"a.weight": quantized((4, 4), dtype=jnp.float8_e5m2)},
        {},
        TypeError,
        "a.weight has dtype float8_e5m2; allowed: float8_e4m3fn",
    ),
    "scales that do not fit": (
        {
            "a.weight": jaxfp8.QuantizedArray(
                *weight(129, 128)[:1], np.ones((1, 1), "f4"), (128, 128)
            )
        },
        {},
        ValueError,
        r"a.weight.scale has shape \(1, 1\); allowed: \(2, 1\)",
    ),
    "scales under a name of their own": (
        {"a.weight": quantized((4, 4)), "a.weight_scale_inv": jnp.ones((1, 1))},
        {},
        ValueError,
        "tree has a.weight_scale_inv",
    ),
    "no bytes": ({"a": jnp.ones(3)}, {"max_shard_bytes": 0}, ValueError, "max_shard_bytes is 0"),
    "bytes as text": (
        {"a": jnp.ones(3)},
        {"max_shard_bytes": "5GB"},
        ValueError,
        "max_shard_bytes is '5GB'",
    ),
    "scales in float16": (
        {"a": jnp.ones(3)},
        {"scale_dtype": jnp.float16},
        TypeError,
        "scale_dtype is .*float16.*; allowed: float32, bfloat16, float8_e8m0fnu",
    ),
    "a config of arrays": ({"a": jnp.ones(3)}, {"config": {"a": KEY}}, TypeError, "config is not"),
    "a config as text": ({"a": jnp.ones(3)}, {"config": "{}"}, TypeError, "config is a str"),
}


@pytest.mark.parametrize("case", NOT_SAVED)
def test_what_the_layout_does_not_hold_is_not_saved(tmp_path, case):
    tree, options, error, words = NOT_SAVED[case]
    with pytest.raises(error, match=f"^save: .*{words}"):
        save(tree, tmp_path / "folder", **options)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_file_takes_no_options_of_a_folder(tmp_path):
    for options in ({"max_shard_bytes": 10}, {"config": {}}):
        with pytest.raises(ValueError, match="x.safetensors; allowed with max_shard_bytes"):
            save({"a": jnp.ones(3)}, tmp_path / "x.safetensors", **options)


# ------------------------------------------------------------------------------------------------
# Malformed checkpoints: a function that writes one, words of the error. None is loaded in part.
# ------------------------------------------------------------------------------------------------

GOOD = pair("a", 130, 128)
HEADER, DATA = raw.header_of(GOOD), raw.data_of(GOOD)
F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
FILE = "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NAMED = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def file_of(content, name=FILE):
    """A checkpoint of one file with this content: bytes, or tensors."""

    def make(folder):
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            raw.write(folder / name, content)

    return make


def with_scale(scale, **more):
    return file_of({"a.weight": GOOD["a.weight"], "a.weight_scale_inv": scale, **more})


def index_of(change, first=FIRST):
    """Two good files whose index, or its text, is changed."""

    def make(folder):
        where = write_two(folder, {"a.weight": GOOD["a.weight"]}, {"x": np.zeros(3, np.float32)})
        raw.write(folder / SECOND, {k: v for k, v in GOOD.items() if k != "a.weight"} | {"x": DOT})
        where["a.weight_scale_inv"] = SECOND
        changed = change(where)
        path = folder / "model.safetensors.index.json"
        if isinstance(changed, dict):
            write_index(folder, changed)
        else:
            path.write_bytes(changed)

    return make


DOT = np.zeros(3, np.float32)


def config_of(config, tensors=None):
    """A good file beside this config.json: bytes, or its quantization_config."""

    def make(folder):
        raw.write(folder / FILE, GOOD if tensors is None else tensors)
        is_text = isinstance(config, bytes)
        text = config if is_text else json.dumps({"quantization_config": config}).encode()
        (folder / "config.json").write_bytes(text)

    return make


def nothing(folder):
    pass


def both_forms(folder):
    write_two(folder, GOOD, {"x": DOT})
    raw.write(folder / FILE, GOOD)


def several_without_index(folder):
    write_two(folder, GOOD, {"x": DOT})
    (folder / "model.safetensors.index.json").unlink()


NO_FILE = "model.safetensors is not a whole safetensors file"
MALFORMED = {
    # Files
    "empty folder": (nothing, "holds 0 .safetensors files and no model.safetensors.index.json"),
    "several files, no index": (several_without_index, "holds 2 .safetensors files"),
    "index and single file": (both_forms, "name the one that is the checkpoint"),
    "empty file": (file_of(b""), NO_FILE),
    "shorter than a length": (file_of(b"\x01\0\0"), NO_FILE),
    "length alone": (file_of((8).to_bytes(8, "little")), NO_FILE),
    "header cut off": (file_of(raw.pack(HEADER)[:40]), NO_FILE),
    "header longer than the file": (file_of(raw.pack(b"{}", length=2**20)), NO_FILE),
    "header of a terabyte": (file_of(raw.pack(b"{}", length=2**40)), NO_FILE),
    "header length negative": (file_of(b"\xff" * 8 + b"{}"), NO_FILE),
    "header empty": (file_of(raw.pack(b"")), NO_FILE),
    "header no JSON": (file_of(raw.pack(b"not json")), NO_FILE),
    "header no UTF-8": (file_of(raw.pack(b"\xff\xfe{}")), NO_FILE),
    "header a list": (file_of(raw.pack([1, 2])), NO_FILE),
    "header of a pickle": (file_of(b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94." + DATA), NO_FILE),
    "header metadata of numbers": (file_of(raw.pack({"__metadata__": {"a": 1}})), NO_FILE),
    "data cut off": (file_of(raw.pack(HEADER, DATA[:-1])), NO_FILE),
    "data missing": (file_of(raw.pack(HEADER)), NO_FILE),
    "bytes after the data": (file_of(raw.pack(HEADER, DATA + b"\0")), NO_FILE),
    "gap before the data": (
        file_of(raw.pack({"x": F32 | {"data_offsets": [4, 8]}}, b"\0" * 8)),
        NO_FILE,
    ),
    "gap between tensors": (
        file_of(raw.pack({"x": F32, "y": F32 | {"data_offsets": [8, 12]}}, b"\0" * 12)),
        NO_FILE,
    ),
    "tensors overlap": (file_of(raw.pack({"x": F32, "y": F32}, b"\0" * 4)), NO_FILE),
    "offsets reversed": (
        file_of(raw.pack({"x": F32 | {"data_offsets": [4, 0]}}, b"\0" * 4)),
        NO_FILE,
    ),
    "offsets missing": (file_of(raw.pack({"x": {"dtype": "F32", "shape": [1]}})), NO_FILE),
    "offsets negative": (
        file_of(raw.pack({"x": F32 | {"data_offsets": [-4, 0]}}, b"\0" * 4)),
        NO_FILE,
    ),
    "shape larger than the bytes": (
        file_of(raw.pack({"x": F32 | {"shape": [2]}}, b"\0" * 4)),
        NO_FILE,
    ),
    "shape negative": (file_of(raw.pack({"x": F32 | {"shape": [-1]}}, b"\0" * 4)), NO_FILE),
    "shape overflows": (
        file_of(raw.pack({"x": F32 | {"shape": [2**40, 2**40]}}, b"\0" * 4)),
        NO_FILE,
    ),
    "shape no list": (file_of(raw.pack({"x": F32 | {"shape": 1}}, b"\0" * 4)), NO_FILE),
    "dtype nonsense": (file_of(raw.pack({"x": F32 | {"dtype": "F33"}}, b"\0" * 4)), NO_FILE),
    "dtype of four bits": (
        file_of(raw.pack({"x": F32 | {"dtype": "F4", "shape": [8]}}, b"\0" * 4)),
        "x in .*model.safetensors has dtype F4; allowed",
    ),
    "dtype E5M2": (
        file_of({"a.weight": GOOD["a.weight"].astype(E5M2)}),
        "a.weight in .* has dtype F8_E5M2",
    ),
    "dtype of another FP8": (
        file_of(raw.pack({"x": F32 | {"dtype": "F8_E4M3FNUZ", "shape": [4]}}, b"\0" * 4)),
        "x in .* has dtype F8_E4M3FNUZ",
    ),
    "float64 without x64": (file_of({"x": np.ones(2)}), "x in .* is F64, which JAX holds with"),
    "int64 without x64": (file_of({"x": np.arange(2)}), "x in .* is I64"),
    # Weights and scales
    "FP8 without scales": (
        file_of({"a.weight": GOOD["a.weight"]}),
        "a.weight in .* is F8_E4M3, with no such tensor; allowed: scales a.weight_scale_inv",
    ),
    "FP8 with a scale a tensor": (
        file_of({"a.weight": GOOD["a.weight"], "a.weight_scale": np.ones(1, np.float32)}),
        "a.weight in .* allowed: scales a.weight_scale_inv",
    ),
    "scales without a weight": (
        file_of({"a.weight_scale_inv": GOOD["a.weight_scale_inv"]}),
        "a.weight_scale_inv in .* scales a.weight, which is not there",
    ),
    "scales of a wide weight": (
        file_of(
            {"a.weight": np.ones((130, 128), BF16), "a.weight_scale_inv": np.ones((2, 1), "f4")}
        ),
        "a.weight in .* is BF16, with that tensor",
    ),
    "scales beside no weight": (
        file_of({"x": np.ones((1, 1), E8M0)}),
        "x in .* is F8_E8M0",
    ),
    "scales transposed": (
        with_scale(np.ones((1, 2), np.float32)),
        r"a.weight_scale_inv in .* has shape \(1, 2\); allowed: \(2, 1\), blocks of 128x128 of a.weight",
    ),
    "scales of whole blocks alone": (with_scale(np.ones((1, 1), np.float32)), r"shape \(1, 1\)"),
    "scales too many": (with_scale(np.ones((3, 1), np.float32)), r"shape \(3, 1\); allowed"),
    "scales of rows": (with_scale(np.ones((130, 1), np.float32)), r"shape \(130, 1\)"),
    "scales in one axis": (with_scale(np.ones(2, np.float32)), r"shape \(2,\); allowed"),
    "scales of a group": (with_scale(np.ones((1, 2, 1), np.float32)), r"shape \(1, 2, 1\)"),
    "one scale": (with_scale(np.float32(1).reshape(())), r"shape \(\); allowed: \(2, 1\)"),
    "scales of nothing": (with_scale(np.ones((2, 0), np.float32)), r"shape \(2, 0\)"),
    "scales in float16": (
        with_scale(np.ones((2, 1), np.float16)),
        "a.weight_scale_inv in .* has dtype F16; allowed: F32, BF16, F8_E8M0",
    ),
    "scales in int32": (with_scale(np.ones((2, 1), np.int32)), "has dtype I32; allowed: F32"),
    "scales as bytes": (with_scale(np.ones((2, 1), np.uint8)), "has dtype U8; allowed: F32"),
    "scales in FP8": (with_scale(np.ones((2, 1), E4M3)), "has dtype F8_E4M3; allowed: F32"),
    "scales of scales": (
        file_of({**GOOD, "a.weight_scale_inv_scale_inv": np.ones((1, 1), np.float32)}),
        "a.weight_scale_inv_scale_inv in .* scales a.weight_scale_inv, which is scales as well",
    ),
    "a vector in FP8": (
        file_of({"a.weight": np.ones(128, E4M3), "a.weight_scale_inv": np.ones(1, np.float32)}),
        r"a.weight has shape \(128,\); allowed: \(N, K\) or \(G, N, K\)",
    ),
    "a scalar in FP8": (
        file_of({"a": np.ones((), E4M3), "a_scale_inv": np.ones((), np.float32)}),
        r"a has shape \(\); allowed",
    ),
    "one good weight, one bad": (
        with_scale(np.ones((2, 1), np.float32), **{"b.weight": np.ones((2, 2), E4M3)}),
        "b.weight in .* is F8_E4M3, with no such tensor",
    ),
    # Indices
    "index no JSON": (index_of(lambda where: b"{"), "index.json is not a JSON file"),
    "index no UTF-8": (index_of(lambda where: b'{"\xff": 1}'), "index.json is not a JSON file"),
    "index a list": (index_of(lambda where: b"[]"), "index.json holds a list"),
    "index nested without end": (index_of(lambda where: b"[" * 100_000), "not a JSON file"),
    "index without map": (index_of(lambda where: b'{"metadata": {}}'), "has no weight_map"),
    "index of nothing": (index_of(lambda where: {}), "has no weight_map"),
    "index map a list": (index_of(lambda where: b'{"weight_map": ["a"]}'), "has no weight_map"),
    "index with a number": (index_of(lambda where: where | {"x": 1}), "has x in 1; allowed"),
    "index with null": (index_of(lambda where: where | {"x": None}), "has x in None; allowed"),
    "index out of its folder": (
        index_of(lambda where: where | {"x": f"../{SECOND}"}),
        "has x in '../model-00002-of-00002.safetensors'; allowed: the name of a .safetensors file",
    ),
    "index out and in again": (
        index_of(lambda where: where | {"x": f"sub/../{SECOND}"}),
        "has x in 'sub/../",
    ),
    "index with an absolute path": (
        index_of(lambda where: where | {"x": f"/etc/{SECOND}"}),
        "has x in '/etc/",
    ),
    "index with a Windows path": (
        index_of(lambda where: where | {"x": f"..\\{SECOND}"}),
        r"has x in '\.\.",
    ),
    "index to the folder": (index_of(lambda where: where | {"x": ".."}), "has x in '..'; allowed"),
    "index with a NUL": (index_of(lambda where: where | {"x": f"\0{SECOND}"}), "has x in"),
    "index to a pickle": (
        index_of(lambda where: where | {"x": "pytorch_model.bin"}),
        "has x in 'pytorch_model.bin'; allowed: the name of a .safetensors file",
    ),
    "index to a file that is not there": (
        index_of(lambda where: where | {"x": "model-00003-of-00002.safetensors"}),
        "has x in model-00003-of-00002.safetensors, which is not there",
    ),
    "index with a tensor that is not there": (
        index_of(lambda where: where | {"y": SECOND}),
        "has y in model-00002-of-00002.safetensors, which holds no such tensor",
    ),
    "index with a tensor in the wrong file": (
        index_of(lambda where: where | {"x": FIRST}),
        "has x in model-00001-of-00002.safetensors, which holds no such tensor",
    ),
    "index without the scales": (
        index_of(lambda where: {k: v for k, v in where.items() if "scale" not in k}),
        "a.weight in .* is F8_E4M3, with no such tensor",
    ),
    "index to a broken file": (
        lambda folder: (
            index_of(lambda where: where)(folder),
            (folder / SECOND).write_bytes(b"\0" * 9),
        ),
        "model-00002-of-00002.safetensors is not a whole safetensors file",
    ),
    # config.json
    "config no JSON": (config_of(b"{'a': 1}"), "config.json is not a JSON file"),
    "config a list": (config_of(b"[]"), "config.json holds a list"),
    "config no object": (config_of("fp8"), "quantization_config of type str"),
    "config of another method": (
        config_of(NAMED | {"quant_method": "awq"}),
        "quant_method 'awq'; allowed: 'fp8'",
    ),
    "config without a method": (
        config_of({"weight_block_size": [128, 128]}),
        "quant_method None; allowed: 'fp8'",
    ),
    "config of E5M2": (config_of(NAMED | {"fmt": "e5m2"}), "fmt 'e5m2'; allowed: 'e4m3' or none"),
    "config of other blocks": (
        config_of(NAMED | {"weight_block_size": [64, 64]}),
        r"weight_block_size \[64, 64\]; allowed: \[128, 128\]",
    ),
    "config of rows": (
        config_of(NAMED | {"weight_block_size": [1, 128]}),
        r"weight_block_size \[1, 128\]",
    ),
    "config of one scale a tensor": (
        config_of({"quant_method": "fp8"}),
        r"weight_block_size None; allowed: \[128, 128\]",
    ),
    "config of static activations": (
        config_of(NAMED | {"activation_scheme": "static"}),
        "activation_scheme 'static'; allowed: 'dynamic' or none",
    ),
    "config of other scales": (config_of(NAMED | {"scale_fmt": "e5m10"}), "scale_fmt 'e5m10'"),
    "config of wide modules as text": (
        config_of(NAMED | {"modules_to_not_convert": "lm_head"}),
        "modules_to_not_convert 'lm_head'; allowed: a list of names",
    ),
    "config of wide modules by number": (
        config_of(NAMED | {"modules_to_not_convert": [1]}),
        r"modules_to_not_convert \[1\]",
    ),
    "config says wide, the file FP8": (
        config_of(NAMED | {"modules_to_not_convert": ["lm_head", "a"]}),
        "a in modules_to_not_convert, but a.weight is F8_E4M3",
    ),
}
assert len(MALFORMED) >= 60


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_checkpoint_is_refused_by_name(tmp_path, monkeypatch, case):
    make, words = MALFORMED[case]
    make(tmp_path)
    monkeypatch.setattr(
        jaxfp8.safetensors, "_place", lambda *_: pytest.fail("a tensor was loaded before the error")
    )
    with pytest.raises(ValueError, match=f"(?s)^load: .*{words}") as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value) or "a.weight has shape" in words or "a has" in words


def test_what_is_not_there_or_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="load: there is nothing at .*absent"):
        load(tmp_path / "absent.safetensors")
    (tmp_path / FILE).symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="load: there is nothing at .*model.safetensors"):
        load(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="path is .*model.bin; allowed: a folder"):
        load(tmp_path / "model.bin")


@pytest.mark.parametrize(
    "config",
    [
        None,
        NAMED,
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        NAMED
        | {"activation_scheme": "dynamic", "scale_fmt": "ue8m0", "packed_modules_mapping": {}},
        NAMED | {"modules_to_not_convert": ["lm_head", "model.norm"]},
        NAMED | {"modules_to_not_convert": None},
    ],
)
def test_configurations_as_they_are_published_are_taken(tmp_path, config):
    config_of(config)(tmp_path)
    assert_holds(load(tmp_path), GOOD)
    assert_holds(load(tmp_path / FILE), GOOD)


@pytest.mark.parametrize(
    "sharding, error, words",
    [
        ("data", TypeError, "sharding is a str; allowed: a jax.sharding.Sharding"),
        (jax.devices()[0], TypeError, "sharding is a .*Device; allowed"),
        (lambda name, shape: P("a"), TypeError, "sharding of a.weight is a P"),
        (
            lambda *_: NamedSharding(mesh(), P("a", "b", None)),
            ValueError,
            "sharding of a.weight .* more axes",
        ),
        (
            lambda *_: NamedSharding(mesh(), P(("a", "b"))),
            ValueError,
            r"sharding of a.weight \(130, 128\)",
        ),
    ],
)
def test_a_sharding_that_does_not_fit_is_refused(tmp_path, sharding, error, words):
    raw.write(tmp_path / FILE, GOOD)
    with pytest.raises(error, match=f"load: {words}"):
        load(tmp_path, sharding=sharding)


def test_bytes_changed_at_random_are_loaded_or_refused(tmp_path):
    """Of header and data: never another exception, never a crash."""
    whole = raw.pack(HEADER, DATA)
    refused = 0
    for i in range(300):
        changed = bytearray(whole)
        for at in RANDOM.integers(0, len(whole) - len(DATA), 1 + i % 3):
            changed[at] = RANDOM.integers(0, 256)
        (tmp_path / FILE).write_bytes(changed)
        try:
            load(tmp_path / FILE)
        except ValueError as error:
            refused += str(error).startswith("load: ")
    assert refused > 200


# ------------------------------------------------------------------------------------------------
# What others make of our files
# ------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_pytorch_reads_the_same_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    for name, options in {"f32": {}, "e8m0": {"scale_dtype": jnp.float8_e8m0fnu}}.items():
        tree = model(scale_format="pow2" if options else "float32")
        save(tree, tmp_path / name, **options)
        theirs = load_file(tmp_path / name / FILE)
        for key, ours in tree.items():
            if not isinstance(ours, jaxfp8.QuantizedArray):
                want = np.asarray(ours, np.float32)
                np.testing.assert_array_equal(theirs[key].float().numpy(), want)
                continue
            assert theirs[key].dtype == torch.float8_e4m3fn
            n, k = ours.shape[-2:]
            scale = theirs[key + "_scale_inv"].float()
            scale = scale.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., :n, :k]
            values = (theirs[key].float() * scale).numpy()
            programs.assert_same_bits(values, ours.dequantize())
        save_file(theirs, tmp_path / name / "torch.safetensors")
        programs.assert_same_bits(load(tmp_path / name / "torch.safetensors"), tree)


def test_the_library_reads_what_is_wide_and_the_metadata(tmp_path):
    from safetensors import safe_open

    save({"a.weight": quantized((4, 4)), "norm.weight": jnp.arange(3.0)}, tmp_path)
    with safe_open(pathlib.Path(tmp_path) / FILE, framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(opened.get_tensor("norm.weight"), np.arange(3.0, dtype="f4"))
