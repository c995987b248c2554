"""The order of rows by expert: a stable sort, for any integers and any number of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp8.ops._routing import plan

RNG = np.random.default_rng(0)
plan = jax.jit(plan, static_argnums=(1, 2))


def by_sorting(expert, num_experts, rows):
    expert, copies = expert.astype(object), expert.size  # exact integers
    flat = np.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    flat = flat.reshape(-1).astype(np.int64)
    order = np.argsort(flat, kind="stable")[: (flat < num_experts).sum()]
    kept = order[:rows]
    copy, position = np.full(rows, copies), np.where(flat < num_experts, rows, -1)
    copy[: len(kept)] = kept
    position[kept] = np.arange(len(kept))
    sizes = np.bincount(flat[kept], minlength=num_experts + 1)[:num_experts]
    return copy // expert.shape[1], copy, position.reshape(expert.shape), sizes


SHAPES = [  # tokens, choices, experts, rows
    (1, 1, 1, None),
    (0, 2, 4, None),
    (5, 3, 7, None),
    (5, 3, 7, 4),
    (5, 3, 7, 40),
    (128, 2, 8, None),
    (1000, 6, 64, None),
    (9000, 2, 5, None),  # several chunks
    (9000, 4, 256, 20000),
]


@pytest.mark.parametrize(("tokens", "choices", "experts", "rows"), SHAPES)
def test_rows_are_those_of_a_stable_sort(tokens, choices, experts, rows):
    expert = RNG.integers(-2, experts + 2, (tokens, choices)).astype(np.int32)
    got = plan(expert, experts, rows)
    want = by_sorting(expert, experts, tokens * choices if rows is None else rows)
    for name, value, expected in zip(got._fields, got, want, strict=True):
        np.testing.assert_array_equal(value, expected, err_msg=name)
        assert value.dtype == np.int32, name


@pytest.mark.parametrize("kind", ["one expert", "none", "in order", "falling"])
def test_rows_of_extreme_choices_are_those_of_a_stable_sort(kind):
    tokens, experts = 300, 16
    expert = {
        "one expert": np.full((tokens, 2), 9),
        "none": np.full((tokens, 2), -1),
        "in order": np.arange(2 * tokens).reshape(tokens, 2) * experts // (2 * tokens),
        "falling": np.arange(2 * tokens)[::-1].reshape(tokens, 2) * experts // (2 * tokens),
    }[kind].astype(np.int32)
    for value, expected in zip(
        plan(expert, experts, None), by_sorting(expert, experts, 2 * tokens), strict=True
    ):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int64, np.uint32])
def test_experts_of_any_integer_type_are_compared_before_they_are_cast(dtype):
    """The largest value of a type is no expert, also where a cast to 32 bits would make it one."""
    with jax.enable_x64(True):
        top = np.iinfo(dtype).max
        expert = np.array([[0, top], [1, 1], [top - 1, 0], [2, 1]], dtype)
        if dtype == np.int64:
            expert[0, 1] = 2**32  # 0 in 32 bits
        got = plan(jnp.asarray(expert), 3, None)
        for value, expected in zip(got, by_sorting(expert, 3, expert.size), strict=True):
            np.testing.assert_array_equal(value, expected)
            assert value.dtype != np.int64


def test_a_type_too_small_for_the_number_of_experts_is_allowed():
    expert = np.array([[127, -128], [3, 127]], np.int8)
    for value, expected in zip(plan(expert, 300, None), by_sorting(expert, 300, 4), strict=True):
        np.testing.assert_array_equal(value, expected)
