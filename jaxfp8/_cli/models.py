"""Shapes of the products of well-known models, from their published configurations."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """`(m, k) . (k, n)`; with groups, m rows in that many ragged groups."""

    name: str
    m: int
    n: int
    k: int
    groups: int = 0


class Model(NamedTuple):
    """Weights `(name, k, n)` of a dense layer, and `(name, k, n, experts, experts a token)` of a mixture."""

    dense: tuple[tuple[str, int, int], ...]
    experts: tuple[tuple[str, int, int, int, int], ...] = ()

    def shapes(self, tokens: int) -> list[Shape]:
        """The products of one layer over `tokens` tokens."""
        dense = [Shape(name, tokens, n, k) for name, k, n in self.dense]
        ragged = [Shape(name, tokens * top, n, k, e) for name, k, n, e, top in self.experts]
        return dense + ragged


def _llama(width: int, hidden: int, heads: int, kv_heads: int, head: int) -> Model:
    qkv = (heads + 2 * kv_heads) * head
    return Model(
        (
            ("qkv", width, qkv),
            ("attention out", heads * head, width),
            ("gate and up", width, 2 * hidden),
            ("down", hidden, width),
        )
    )


MODELS = {
    # hidden_size, intermediate_size, heads, key-value heads, head_dim: the models' config.json
    "smollm2-135m": _llama(576, 1536, 9, 3, 64),
    "llama-3-8b": _llama(4096, 14336, 32, 8, 128),
    "llama-3-70b": _llama(8192, 28672, 64, 8, 128),
    "qwen2.5-7b": _llama(3584, 18944, 28, 4, 128),
    "mixtral-8x7b": Model(
        _llama(4096, 14336, 32, 8, 128).dense[:2],
        (("experts: gate and up", 4096, 2 * 14336, 8, 2), ("experts: down", 14336, 4096, 8, 2)),
    ),
    # arXiv 2412.19437, section 4.2: width 7168, 128 heads of 128 (+ 64 rotary), query rank 1536, key-value rank 512
    "deepseek-v3": Model(
        (
            ("query and key-value down", 7168, 1536 + 512 + 64),
            ("query up", 1536, 128 * (128 + 64)),
            ("key-value up", 512, 128 * (128 + 128)),
            ("attention out", 128 * 128, 7168),
            ("shared expert: gate and up", 7168, 2 * 2048),
            ("shared expert: down", 2048, 7168),
        ),
        (("experts: gate and up", 7168, 2 * 2048, 256, 8), ("experts: down", 2048, 7168, 256, 8)),
    ),
}
