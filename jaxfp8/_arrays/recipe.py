"""How products are quantized, and the recipe in force."""

import dataclasses
import threading
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

ScaleFormat = Literal["float32", "pow2"]

FP8_DTYPES = (np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2))
SCALE_FORMATS = ("float32", "pow2")


def fp8_dtype(argument: str, dtype: Any) -> np.dtype:
    """`dtype` as one of the two FP8 types, or TypeError."""
    try:
        found = jnp.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found not in FP8_DTYPES:
        raise TypeError(f"{argument} is {dtype!r}; allowed: float8_e4m3fn, float8_e5m2")
    return found


def scale_format_name(argument: str, scale_format: Any) -> ScaleFormat:
    if not isinstance(scale_format, str) or scale_format not in SCALE_FORMATS:
        raise ValueError(f"{argument} is {scale_format!r}; allowed: 'float32', 'pow2'")
    return cast(ScaleFormat, scale_format)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the differentiable operations quantize to. The default is DeepSeek-V3's (arXiv 2412.19437, 3.3).

    Activations and gradients are scaled per 1x128 block, weights per 128x128 block; products accumulate in float32.

    A recipe is given as an argument (`linear(x, w, recipe=...)`) or holds inside a `with` block:

        with jaxfp8.Recipe(grad_dtype=jnp.float8_e5m2):
            loss, grads = jax.value_and_grad(loss_fn)(params)

    An argument wins over a block, an inner block over an outer one. `jax.jit` retraces when the block's recipe changes.

    **Arguments:**

    - `dtype`: FP8 type of activations and weights, float8_e4m3fn or float8_e5m2.
    - `grad_dtype`: FP8 type of gradients.
    - `scale_format`: `"float32"`, or `"pow2"`: scales rounded up to powers of two, with which dequantization is exact
      in bfloat16.
    - `grad_scale_format`: the same for gradients; None takes `scale_format`.
    - `num_sms`: multiprocessors that a product may use on a GPU, or None for all. Leaves room for communication.
    - `wgrad_dtype`: float32, or bfloat16: weight gradients are then made in bfloat16, and summed in it over the devices
      that each have a part of the tokens. Half the bytes of that sum; each of n parts and of the n - 1 sums rounds to
      8 bits. (In float32 a gradient is made in the weight's dtype, and partial ones in float32.)
    - `reduce_dtype`: the same of what devices sum in results and input gradients, where they cut a contraction (the
      rows of a weight in tensor parallelism).

    **Raises:** TypeError or ValueError for anything else.
    """

    __module__ = "jaxfp8"  # pickles name no private file

    dtype: Any = jnp.float8_e4m3fn
    grad_dtype: Any = jnp.float8_e4m3fn
    scale_format: ScaleFormat = "float32"
    grad_scale_format: ScaleFormat | None = None
    num_sms: int | None = None
    wgrad_dtype: Any = jnp.float32
    reduce_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "dtype", fp8_dtype("Recipe: dtype", self.dtype))
        put(self, "grad_dtype", fp8_dtype("Recipe: grad_dtype", self.grad_dtype))
        scale_format_name("Recipe: scale_format", self.scale_format)
        if self.grad_scale_format is not None:
            scale_format_name("Recipe: grad_scale_format", self.grad_scale_format)
        check_num_sms("Recipe", self.num_sms)
        for field in ("wgrad_dtype", "reduce_dtype"):
            put(self, field, _sum_dtype(f"Recipe: {field}", getattr(self, field)))

    def __repr__(self) -> str:
        def text(value):
            return value.name if isinstance(value, np.dtype) else repr(value)

        fields = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"Recipe({', '.join(f'{f.name}={text(getattr(self, f.name))}' for f in fields)})"

    def __enter__(self) -> "Recipe":
        block = _in_force(self)
        block.__enter__()
        _blocks.stack.append(block)
        return self

    def __exit__(self, *exc: Any) -> None:
        _blocks.stack.pop().__exit__(*exc)

    def made_in(self, weight_dtype: Any) -> np.dtype:
        """The dtype in which the gradient of a weight of this dtype is made."""
        made = np.dtype(self.wgrad_dtype)
        return made if made == jnp.bfloat16 else np.dtype(weight_dtype)

    @property
    def backward_scale_format(self) -> ScaleFormat:
        """Scale format of gradients."""
        return self.scale_format if self.grad_scale_format is None else self.grad_scale_format


def _sum_dtype(argument: str, dtype: Any) -> np.dtype:
    """`dtype` as float32 or bfloat16, or TypeError."""
    try:
        found = jnp.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found not in (np.dtype(jnp.float32), np.dtype(jnp.bfloat16)):
        raise TypeError(f"{argument} is {dtype!r}; allowed: float32, bfloat16")
    return found


def check_num_sms(function: str, num_sms: Any) -> None:
    if num_sms is None:
        return
    if isinstance(num_sms, bool) or not isinstance(num_sms, (int, np.integer)):
        raise TypeError(
            f"{function}: num_sms is {num_sms!r}; allowed: a positive int, or None for all"
        )
    if num_sms < 1:
        raise ValueError(
            f"{function}: num_sms is {num_sms}; allowed: a positive int, or None for all"
        )


class _Blocks(threading.local):
    """The `with` blocks that this thread has entered."""

    def __init__(self) -> None:
        self.stack: list[Any] = []


_blocks = _Blocks()
# Part of JAX's cache key, so that a jitted function is traced anew under another recipe.
_in_force = jax.make_user_context(default_value=None)


def current_recipe(function: str, recipe: Recipe | None = None) -> Recipe:
    """The argument if there is one, else the innermost `with` block's recipe, else the default."""
    if recipe is None:
        recipe = _in_force.value
    if recipe is None:
        return Recipe()
    if not isinstance(recipe, Recipe):
        raise TypeError(f"{function}: recipe is {recipe!r}; allowed: a jaxfp8.Recipe, or None")
    return recipe


class Format(NamedTuple):
    """What a quantizer writes."""

    dtype: np.dtype
    pow2: bool


def result_options(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of the products that give results and input gradients."""
    return {"num_sms": recipe.num_sms, "sum_dtype": recipe.reduce_dtype}


def weight_gradient_options(recipe: Recipe) -> dict[str, Any]:
    """The same of those that give weight gradients."""
    return {"num_sms": recipe.num_sms, "sum_dtype": recipe.wgrad_dtype}


def forward_format(recipe: Recipe) -> Format:
    """Format of activations and weights."""
    return Format(recipe.dtype, recipe.scale_format == "pow2")


def gradient_recipe(recipe: Recipe) -> Recipe:
    """The recipe by which a gradient is quantized as a recipe's activations are."""
    return dataclasses.replace(
        recipe, dtype=recipe.grad_dtype, scale_format=recipe.backward_scale_format
    )


def gradient_format(recipe: Recipe) -> Format:
    """Format of gradients."""
    return Format(recipe.grad_dtype, recipe.backward_scale_format == "pow2")
