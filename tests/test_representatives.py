"""What the default suite takes of a parametrized test stands for all of its cases."""

import itertools

import pytest

from tests.representatives import choose


def cases(*values):
    names = "abcd"[: len(values)]
    return [
        ("-".join(map(str, c)), dict(zip(names, c, strict=True)))
        for c in itertools.product(*values)
    ]


def seen(all_cases, chosen, name):
    return [all_cases[i][1][name] for i in chosen]


def test_every_value_of_a_named_argument_is_taken_with_as_few_cases_as_there_are():
    grid = cases(range(5), "xyz", [True, False])
    chosen = choose(grid, ("a", "b"), 1)
    assert sorted(seen(grid, chosen, "a")) == [0, 1, 2, 3, 4]
    assert set(seen(grid, chosen, "b")) == set("xyz")


def test_other_arguments_vary_as_far_as_they_can():
    grid = cases(range(4), range(4))
    assert sorted(seen(grid, choose(grid, ("a",), 1), "b")) == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [1, 3, 100])
def test_so_many_cases_are_taken_at_least_and_none_twice(count):
    grid = cases(range(7))
    chosen = choose(grid, (), count)
    assert len(chosen) == len(set(chosen)) == min(count, 7)


def test_a_choice_depends_neither_on_order_nor_on_values_that_have_no_hash():
    grid = cases([[1], [2], [1]], range(3))
    chosen = {grid[i][0] for i in choose(grid, ("a",), 3)}
    assert chosen == {grid[::-1][i][0] for i in choose(grid[::-1], ("a",), 3)}
    assert len(choose(grid, ("a",), 1)) == 2
