"""Configurations: by name from the caller, from measured tables, or from the heuristic; and how tables are made."""

import functools
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp8
from jaxfp8 import _ffi
from jaxfp8._tools import tune as _tune
from jaxfp8.kernels import configurations
from jaxfp8.kernels.configurations import SHIPPED, config_names, read_table
from tests.emulated_platform import emulated_platform
from tests.kernel_cases import quantized

kernels = pytest.mark.skipif(not _ffi.images(), reason="this build of jaxfp8 holds no kernels")

PRODUCT = jaxfp8.Product("gemm_1d2d", 70, 136, 200, out_dtype="float32")


def operands(m=70, n=136, k=200, square=True):
    return quantized(0, m, k), quantized(1, n, k, block=(128, 128) if square else (1, 128))


def config_attributes(function, *args):
    """The `config` attribute of every product in a program lowered for cuda."""
    fresh = jax.jit(lambda *args: function(*args))  # JAX does not lower the same function again
    text = fresh.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return [int(x) for x in re.findall(r"config = (-?\d+) : i32", text)]


@pytest.fixture
def tables(monkeypatch):
    """Tables of this test alone, on a device of the kind "test"."""
    monkeypatch.setattr(configurations, "lowering_device_kind", lambda: "test")
    table = {}
    monkeypatch.setattr(configurations, "_tables", lambda: table)
    return table


# ---- By name


@kernels
@pytest.mark.parametrize("square", [True, False], ids=["128x128", "1x128"])
def test_a_named_config_is_the_custom_calls_attribute(square):
    lhs, rhs = operands(square=square)
    names = config_names("gemm_1d2d" if square else "gemm_1d1d")
    for i in (0, len(names) - 1):
        f = functools.partial(jaxfp8.gemm, config=names[i])
        assert config_attributes(f, lhs, rhs) == [i]
    assert config_attributes(jaxfp8.gemm, lhs, rhs) == [-1]


@pytest.mark.parametrize("config", ["m1n1 cluster 1x1", "", "m128n128"])
def test_a_config_that_does_not_exist_is_refused_by_name(config):
    lhs, rhs = operands()
    sizes = jnp.asarray([3, 4])
    stacked = quantized(2, 2, 136, 200, block=(128, 128))
    calls = {
        "gemm": lambda: jaxfp8.gemm(lhs, rhs, config=config),
        "wgrad_gemm": lambda: jaxfp8.wgrad_gemm(lhs, lhs, config=config),
        "grouped_gemm": lambda: jaxfp8.grouped_gemm(lhs, stacked, sizes, config=config),
        "masked_grouped_gemm": lambda: jaxfp8.masked_grouped_gemm(
            quantized(0, 2, 70, 200), stacked, sizes, config=config
        ),
        "grouped_wgrad_gemm": lambda: jaxfp8.grouped_wgrad_gemm(
            quantized(0, 8, 384), quantized(0, 16, 384), sizes, config=config
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}: config is '{config}'; allowed: None, m64n"):
            call()


def test_a_config_is_a_name():
    with pytest.raises(
        TypeError, match="gemm: config is 3; allowed: a configuration's name, or None"
    ):
        jaxfp8.gemm(*operands(), config=3)


# ---- Tables


@kernels
def test_a_tuned_product_runs_with_its_config_and_no_other_does(tables):
    lhs, rhs = operands()
    name = PRODUCT.configs[3]
    tables["test"] = {PRODUCT: (name, 1.0)}
    f32 = functools.partial(jaxfp8.gemm, out_dtype=jnp.float32)
    assert config_attributes(f32, lhs, rhs) == [3]
    assert config_attributes(jaxfp8.gemm, lhs, rhs) == [-1]  # bfloat16
    assert config_attributes(functools.partial(f32, num_sms=4), lhs, rhs) == [-1]
    assert config_attributes(functools.partial(f32, config=PRODUCT.configs[0]), lhs, rhs) == [0]
    tables["another device"] = tables.pop("test")
    assert config_attributes(f32, lhs, rhs) == [-1]


def fake(best):
    """A way to time that finds `best` fastest."""

    def measure(product, configs, *, device, repeats):
        return {c: 0.5 if c == best else 1.0 for c in configs}

    return measure


def test_tune_keeps_the_fastest_for_this_process_and_in_the_file(tables, tmp_path):
    path, device = tmp_path / "tuned.json", jax.devices()[0]
    other = jaxfp8.Product("grouped_gemm", 300, 64, 128, groups=3, num_sms=1)
    best = PRODUCT.configs[5]
    seen = []
    choices = jaxfp8.tune(
        [PRODUCT, PRODUCT],
        path=path,
        device=device,
        measure=fake(best),
        report=lambda *a: seen.append(a),
    )
    assert choices == {PRODUCT: best}
    assert seen[0][:2] == (PRODUCT, best) and len(seen) == 1
    assert tables[device.device_kind][PRODUCT][0] == best
    # A second run keeps the first's entries; clusters that num_sms does not hold are not measured.
    jaxfp8.tune([other], path=path, device=device, measure=fake(other.configs[0]))
    entries = json.loads(path.read_text())["devices"][device.device_kind]
    assert [(e["kind"], e["config"]) for e in entries] == [
        ("gemm_1d2d", best),
        ("grouped_gemm", other.configs[0]),
    ]
    tables.clear()
    assert jaxfp8.load_tuned(path) == 2
    assert set(tables[device.device_kind]) == {PRODUCT, other}


def test_tune_keeps_the_heuristics_choice_unless_another_is_one_percent_faster(tables):
    heuristic = _tune.heuristic_config(PRODUCT, 132)
    other = next(c for c in PRODUCT.configs if c != heuristic)
    for gain, chosen in ((0.005, heuristic), (0.02, other)):

        def measure(product, configs, *, device, repeats, gain=gain):
            return {c: 1 - gain if c == other else 1.0 for c in configs}

        assert jaxfp8.tune([PRODUCT], device=jax.devices()[0], measure=measure) == {PRODUCT: chosen}


@pytest.mark.parametrize(
    "product",
    [
        PRODUCT,
        jaxfp8.Product("gemm_1d1d", 70, 130, 201, accum=True, rhs_dtype="float8_e5m2"),
        jaxfp8.Product("gemm_1d2d", 1, 64, 16, groups=3, shared_lhs=True),
        jaxfp8.Product("grouped_gemm", 300, 64, 128, groups=3, lhs_dtype="float8_e5m2"),
        jaxfp8.Product("masked_grouped_gemm", 30, 64, 128, groups=3, num_sms=2),
        jaxfp8.Product("grouped_wgrad_gemm", 30, 64, 128 * 7, groups=3, out_dtype="float32"),
    ],
    ids=lambda p: p.kind,
)
def test_the_heuristic_names_a_config_of_every_kind(product):
    assert _tune.heuristic_config(product, 132) in product.configs


def test_tune_refuses_what_is_no_product():
    with pytest.raises(TypeError, match="tune: products holds 3; allowed: jaxfp8.Product"):
        jaxfp8.tune([3], device=jax.devices()[0])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "gemm"}, "kind is 'gemm'; allowed: gemm_1d1d"),
        ({"m": 0}, "m is 0; allowed: an int, at least 1"),
        ({"num_sms": -1}, "num_sms is -1; allowed: an int, at least 0"),
        ({"lhs_dtype": "float32"}, "lhs_dtype is 'float32'; allowed: float8_e4m3fn, float8_e5m2"),
        ({"out_dtype": "float16"}, "out_dtype is 'float16'; allowed: "),
        ({"kind": "grouped_wgrad_gemm", "groups": 3}, "k is 256; allowed: 128"),
    ],
)
def test_a_product_that_no_kernel_computes_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jaxfp8.Product(**{"kind": "gemm_1d2d", "m": 8, "n": 8, "k": 256} | fields)


ENTRY = {"kind": "gemm_1d2d", "m": 8, "n": 8, "k": 16, "config": "m64n32 cluster 1x1"}


TIMED = {
    "kind": "gemm_1d2d",
    "m": 8,
    "n": 8,
    "k": 16,
    "config": "m64n32 cluster 1x1",
    "microseconds": 1,
}


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"format": 1',
        b"\xff\xfe\x00",
        {"format": 1},
        {"format": 1, "devices": None},
        {"format": 1, "devices": []},
        {"format": 1, "devices": {"H200": {}}},
        {"format": 1, "devices": {"H200": "gemm"}},
        *(
            {"format": 1, "devices": {"H200": [entry]}}
            for entry in (
                1,
                None,
                [["kind", "gemm_1d2d"]],
                {},
                {**TIMED, "m": "128"},
                {**TIMED, "m": True},
                {**TIMED, "kind": ["gemm_1d2d"]},
                {**TIMED, "lhs_dtype": {}},
                {**TIMED, "config": ["m64n64 cluster 1x1"]},
                {**TIMED, "config": None},
                {**TIMED, "microseconds": "soon"},
                {**TIMED, "another": 1},
                {**TIMED, "num_sms": 1, "config": "m64n64 cluster 1x2"},
            )
        ),
    ],
    ids=lambda content: str(content)[:40],
)
def test_a_malformed_table_is_a_value_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "t.json"
    text = content if isinstance(content, bytes | str) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(str(path))):
        jaxfp8.load_tuned(path)


def test_the_written_table_keeps_its_mode_and_the_link_that_names_it(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    link.symlink_to(real)
    mask = os.umask(0o027)
    try:
        configurations.write_table(link, {})
    finally:
        os.umask(mask)
    assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o640
    real.chmod(0o604)
    configurations.write_table(link, {})
    assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o604
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "real.json"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "no JSON"),
        ("[]", "no table of configurations"),
        ('{"format": 2, "devices": {}}', "no table of configurations"),
        (json.dumps({"format": 1, "devices": {"d": [ENTRY]}}), "is no entry"),
        (
            json.dumps(
                {"format": 1, "devices": {"d": [ENTRY | {"config": "m3n3", "microseconds": 1}]}}
            ),
            "names a configuration that this version of jaxfp8 does not have",
        ),
    ],
    ids=["no JSON", "a list", "another format", "no time", "unknown config"],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, content, message):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"t.json: .*{message}"):
        jaxfp8.load_tuned(path)


def test_the_shipped_table_is_one():
    for products in read_table(SHIPPED).values():
        assert products


# ---- What a program multiplies


def test_products_of_a_program_are_those_of_its_custom_calls():
    x, w = jnp.ones((70, 200)), jnp.ones((200, 136), jnp.bfloat16)
    loss = lambda x, w: jaxfp8.linear(x, w).astype(jnp.float32).sum()  # noqa: E731
    got = jaxfp8.products_of(jax.grad(loss, (0, 1)), x, w)
    assert [(p.kind, p.m, p.n, p.k) for p in got] == [
        ("gemm_1d1d", 200, 136, 70),
        ("gemm_1d2d", 70, 200, 136),
    ]
    # The same function again, and one that holds a batch, an accumulator and groups.
    assert jaxfp8.products_of(jax.grad(loss, (0, 1)), x, w) == got

    def groups(lhs, rhs, sizes, accum):
        y = jaxfp8.grouped_gemm(lhs, rhs, sizes, num_sms=7)
        return y, jaxfp8.wgrad_gemm(lhs, lhs, accum=accum)

    lhs, rhs = quantized(0, 70, 200), quantized(1, 3, 136, 200, block=(128, 128))
    sizes, accum = jnp.asarray([1, 2, 3]), jnp.zeros((70, 70))
    assert jaxfp8.products_of(groups, lhs, rhs, sizes, accum) == [
        jaxfp8.Product("gemm_1d1d", 70, 70, 200, out_dtype="float32", accum=True),
        jaxfp8.Product("grouped_gemm", 70, 136, 200, groups=3, num_sms=7),
    ]


# ---- On the emulated platform


@pytest.mark.full
@pytest.mark.emulated
@kernels
@pytest.mark.parametrize("square", [True, False], ids=["128x128", "1x128"])
def test_every_config_gives_the_same_bits(square):
    """Blocks are added in order whatever the tile."""
    lhs, rhs = operands(square=square)
    names = config_names("gemm_1d2d" if square else "gemm_1d1d")
    with emulated_platform(num_sms=2):
        results = {
            name: np.asarray(jaxfp8.gemm(lhs, rhs, out_dtype=jnp.float32, config=name))
            for name in names
        }
    for name, v in results.items():
        np.testing.assert_array_equal(v, results[names[0]], err_msg=name)


@pytest.mark.emulated
@kernels
@pytest.mark.parametrize(
    "product",
    [
        jaxfp8.Product("gemm_1d2d", 8, 24, 32, accum=True),
        pytest.param(
            jaxfp8.Product("grouped_wgrad_gemm", 8, 24, 128 * 3, groups=2, out_dtype="float32"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            jaxfp8.Product("masked_grouped_gemm", 8, 24, 32, groups=2), marks=pytest.mark.slow
        ),
    ],
    ids=lambda p: p.kind,
)
@pytest.mark.full
def test_measuring_runs_each_config_on_operands_of_its_kind(tables, product):
    device = jax.devices()[0]
    two = product.configs[:2]

    def measure(product, configs, **options):
        return dict.fromkeys(configs, 9.0) | _tune.measure(product, two, **options)

    with emulated_platform(num_sms=2) as driver:
        choices = jaxfp8.tune([product], device=device, repeats=1, measure=measure)
    assert choices[product] in two
    launched = {launch.kernel for launch in driver.launches}
    assert len(launched) == 2


@pytest.mark.skipif(
    any(d.platform == "gpu" for d in jax.devices()), reason="there is a GPU to measure on"
)
def test_without_a_gpu_tune_says_what_to_do():
    with pytest.raises(RuntimeError, match="^tune: JAX finds no CUDA device to measure on; run"):
        jaxfp8.tune([PRODUCT])
