"""How step time and communication grow with the number of GPUs: a model on paper.

    python examples/scaling_model.py                             # the tables of docs/scaling.md
    python examples/scaling_model.py --gpus 256 --layers 48 --width 6144 --heads 48 --kv-heads 8 \\
        --hidden 16384 --tensor 4                                # your own dense model
    python examples/scaling_model.py --gpus 256 --layers 32 --width 4096 --heads 32 --hidden 3072 \\
        --experts 64 --choices 6 --expert-hidden 1536 --expert-parallel 16   # your own mixture

Everything is per GPU and per layer, forward and backward, and follows from the formulas in `layer`:
floating-point operations of the products, bytes between GPUs, and the seconds that both take. Bytes
are what a GPU receives. What overlaps is stated: a layer's weights are gathered, and its gradients
scattered, while its neighbours compute; the sums of tensor parallelism and the travel of tokens
wait for what they bring.

It leaves out: attention's softmax, norms, the optimizer, launch latency, stragglers, congestion.
"""

from __future__ import annotations

import argparse
import dataclasses

SCALE = 4 / 128  # bytes of float32 scales for an element in 1x128 blocks
SQUARE_SCALE = 4 / 128**2  # in 128x128 blocks
BLOCK_SLACK = 1.25  # of what a peer gets if experts are equally busy: `max_sent` of `dispatch`


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder. `hidden`: of the dense SwiGLU, or of what every token shares in a mixture."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int = 128_256
    sequence: int = 4096
    experts: int = 0
    choices: int = 0
    expert_hidden: int = 0

    @property
    def attention_weights(self) -> int:
        """Elements of a layer's projections: queries and output, keys and values."""
        size = self.width // self.heads
        return 2 * self.width * self.width + 2 * self.width * self.kv_heads * size

    @property
    def dense_weights(self) -> int:
        """Elements of a layer's matrices that every token uses."""
        return self.attention_weights + 3 * self.width * self.hidden

    @property
    def expert_weights(self) -> int:
        return self.experts * 3 * self.width * self.expert_hidden

    @property
    def parameters(self) -> int:
        layer = self.dense_weights + self.expert_weights
        return self.layers * layer + 2 * self.vocabulary * self.width

    @property
    def active_parameters(self) -> int:
        """That a token is multiplied by."""
        chosen = self.choices * 3 * self.width * self.expert_hidden
        return self.layers * (self.dense_weights + chosen) + self.vocabulary * self.width


@dataclasses.dataclass(frozen=True)
class Machine:
    """A GPU, its node and its network. Bytes a second in one direction, per GPU."""

    # A layer's forward and backward products, quantization included: docs/scaling.md says whence.
    fp8_flops: float = 0.96e15
    bf16_flops: float = 0.69e15
    fp8_expert_flops: float = 0.46e15
    bf16_expert_flops: float = 0.23e15
    node_bandwidth: float = 450e9 * 0.8  # NVLink 4, of which a collective reaches about 0.8
    network_bandwidth: float = 50e9 * 0.8  # one 400 Gb/s port a GPU
    node: int = 8

    def bandwidth(self, group: int, stride: int = 1) -> float:
        """Of a collective in a group of GPUs that are `stride` apart."""
        return self.node_bandwidth if group * stride <= self.node else self.network_bandwidth


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many GPUs share what: gpus = data * tensor; experts are cut over `expert` of `data`."""

    gpus: int
    tensor: int = 1
    expert: int = 1
    fp8: bool = True

    @property
    def data(self) -> int:
        return self.gpus // self.tensor


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer's forward and backward pass on one GPU."""

    flops: float
    gather: float  # bytes of weights, forward and backward
    scatter: float  # bytes of weight gradients
    tensor: float  # bytes of activations between the GPUs of a tensor-parallel group
    experts: float  # bytes of tokens and their sums between the GPUs of an expert-parallel group
    compute_seconds: float
    hidden_seconds: float  # of communication that runs beside the products
    exposed_seconds: float  # of communication that the products wait for


def arrivals(model: Model, layout: Layout, machine: Machine, tokens: float) -> tuple[float, float]:
    """Tokens that a GPU with so many of its own receives from GPUs of its node, and from other nodes.

    As `jaxfp8.dispatch` sends them over one axis: each once to every GPU that needs it, in blocks,
    or to all where blocks would be no smaller. Or over two, ("node", "gpu"): each once to every
    node that needs it, and there to all GPUs. The faster.
    """
    inside = min(layout.expert, max(1, machine.node // layout.tensor))
    nodes = layout.expert // inside

    def block(peers: int) -> float:
        """Tokens for one of so many peers: those that have one of a token's experts there."""
        needed = 1 - (1 - 1 / peers) ** model.choices
        return tokens * min(1.0, BLOCK_SLACK * needed)

    one = (inside - 1) * block(layout.expert), (layout.expert - inside) * block(layout.expert)
    two = (inside - 1) * nodes * block(nodes), (nodes - 1) * block(nodes)
    return min(one, two, key=lambda ways: seconds_a_byte(machine, *ways))


def seconds_a_byte(machine: Machine, node: float, network: float) -> float:
    """Of tokens of one byte each, so many from the node and from beyond it."""
    return node / machine.node_bandwidth + network / machine.network_bandwidth


def layer(model: Model, layout: Layout, machine: Machine, tokens: int) -> Layer:
    """The formulas. `tokens`: of the whole batch."""
    local = tokens / layout.data  # tokens of a GPU; its tensor-parallel group shares them
    width = model.width
    # Forward, dgrad and wgrad: two operations a weight and token each; attention is causal.
    products = 3 * 2 * local * model.dense_weights / layout.tensor
    chosen = 3 * 2 * local * model.choices * 3 * width * model.expert_hidden / layout.tensor
    attention = 3 * 2 * local * model.sequence * width / layout.tensor
    element = 1 + SQUARE_SCALE if layout.fp8 else 2

    def ring(elements: float, group: int) -> float:
        """Elements that a GPU receives in an all-gather or reduce-scatter of so many in all."""
        return elements * (group - 1) / group

    # FSDP: each matrix is gathered forward and again backward; its float32 gradient is scattered.
    dense = ring(model.dense_weights / layout.tensor, layout.data)
    replicas = layout.data // layout.expert  # that hold the same experts
    mixture = ring(model.expert_weights / layout.expert / layout.tensor, replicas)
    gather = 2 * element * (dense + mixture)
    scatter = 4 * (dense + mixture)

    # Tensor parallelism with sequence parallelism, of attention and SwiGLU each. FP8: x and dy are
    # gathered as rows and as columns; y and dx are summed in float32. BF16: x is gathered forward
    # and again backward, dy once; y and dx are summed in bfloat16.
    activation = ring(local * width, layout.tensor)
    moved = 1 + SCALE if layout.fp8 else 2
    tensor = 2 * activation * (4 * moved + 2 * 4 if layout.fp8 else 3 * 2 + 2 * 2)

    # Experts: a token there once a GPU (or node), in FP8 with scales, and the numbers of its experts;
    # its gates too, and backward their gradient back. A sum in bfloat16 back. Gradients the same way.
    node, network = arrivals(model, layout, machine, local / layout.tensor)
    token = 2 * width * (moved + 2) + 3 * 4 * model.choices
    experts = (node + network) * token

    rate = machine.fp8_flops if layout.fp8 else machine.bf16_flops
    expert_rate = machine.fp8_expert_flops if layout.fp8 else machine.bf16_expert_flops
    compute = products / rate + chosen / expert_rate + attention / machine.bf16_flops
    weights = (gather + scatter) / machine.bandwidth(layout.data, layout.tensor)
    waits = tensor / machine.bandwidth(layout.tensor)
    waits += token * seconds_a_byte(machine, node, network)
    return Layer(
        products + chosen + attention,
        gather,
        scatter,
        tensor,
        experts,
        compute,
        min(weights, compute),
        waits + max(0.0, weights - compute),
    )


def step_seconds(model: Model, layout: Layout, machine: Machine, tokens: int) -> float:
    """A training step: the layers, and the head in bfloat16."""
    one = layer(model, layout, machine, tokens)
    head = 3 * 2 * tokens / layout.gpus * model.vocabulary * model.width / machine.bf16_flops
    return model.layers * (one.compute_seconds + one.exposed_seconds) + head


def check(model: Model, layout: Layout) -> None:
    """**Raises:** ValueError for a layout that the model cannot be cut into."""
    for what, size, name, parts in (
        ("gpus", layout.gpus, "tensor", layout.tensor),
        ("data", layout.data, "expert", layout.expert),
        ("heads", model.heads, "tensor", layout.tensor),
        ("experts", model.experts, "expert", layout.expert),
    ):
        if size % parts:
            raise ValueError(f"{name} is {parts}; it must divide {what}, which is {size}")


DENSE_70B = Model("70B dense", 80, 8192, 64, 8, 28_672)
MOE_16B = Model(
    "16B mixture", 27, 2048, 16, 16, 2 * 1408, 102_400, experts=64, choices=6, expert_hidden=1408
)
TOKENS_PER_GPU = 16_384
GPUS = (8, 64, 256, 1024)


def layouts(model: Model) -> list[Layout]:
    """What the tables show: experts within a node; a dense model at its fastest width of `tensor`."""
    if model.experts:
        return [Layout(n, expert=8) for n in GPUS]
    return [
        min(
            (Layout(n, tensor=t) for t in (1, 2, 4, 8)),
            key=lambda layout: step_seconds(model, layout, Machine(), TOKENS_PER_GPU * n),
        )
        for n in GPUS
        if 16 * model.parameters / n < 40e9  # parameters, gradients and moments in float32 fit
    ]


def table(model: Model, rows: list[Layout], tokens_per_gpu: int, machine: Machine) -> str:
    lines = [
        f"{model.name}: {model.parameters / 1e9:.1f} B parameters, {model.active_parameters / 1e9:.1f} B a "
        f"token; {tokens_per_gpu} tokens a GPU and step",
        "",
        "| GPUs | layout | state GB | TFLOP | gather MB | scatter MB | tensor MB | experts MB | compute ms "
        "| hidden ms | exposed ms | step s | BF16 step s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for layout in rows:
        tokens = tokens_per_gpu * layout.gpus
        one = layer(model, layout, machine, tokens)
        bf16 = dataclasses.replace(layout, fp8=False)
        parts = [f"data {layout.data}"]
        parts += [f"tensor {layout.tensor}"] * (layout.tensor > 1)
        parts += [f"expert {layout.expert}"] * (layout.expert > 1)
        cells = [
            layout.gpus,
            ", ".join(parts),
            f"{16 * model.parameters / layout.gpus / 1e9:.1f}",
            f"{one.flops / 1e12:.1f}",
            *(f"{v / 1e6:.0f}" for v in (one.gather, one.scatter, one.tensor, one.experts)),
            *(
                f"{v * 1e3:.1f}"
                for v in (one.compute_seconds, one.hidden_seconds, one.exposed_seconds)
            ),
            f"{step_seconds(model, layout, machine, tokens):.2f}",
            f"{step_seconds(model, bf16, machine, tokens):.2f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def tables() -> str:
    """The tables of docs/scaling.md."""
    machine = Machine()
    return "\n\n".join(
        table(model, layouts(model), TOKENS_PER_GPU, machine) for model in (MOE_16B, DENSE_70B)
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    numbers = (
        "gpus", "layers", "width", "heads", "kv-heads", "hidden", "vocabulary", "sequence", "experts", "choices",
        "expert-hidden", "tensor", "expert-parallel", "tokens-per-gpu", "node",
    )  # fmt: skip
    for name in numbers:
        parser.add_argument(f"--{name}", type=int)
    for field in dataclasses.fields(Machine):
        if field.type == "float":
            name = field.name.replace("_", "-")
            parser.add_argument(f"--{name}", type=float, help=f"default: {field.default:g}")
    args = parser.parse_args(argv)
    given = {k: v for k, v in vars(args).items() if v is not None}
    if not given:
        print(tables())
        return
    machine = Machine(**{k: v for k, v in given.items() if k in Machine.__annotations__})
    needed = ("gpus", "layers", "width", "heads", "hidden")
    if missing := [f"--{n}" for n in needed if n not in given]:
        parser.error(f"a model of your own needs {', '.join(missing)} as well")
    if any(v < 1 for v in given.values()):
        parser.error("sizes and rates must be positive")
    model_fields = {k: v for k, v in given.items() if k in Model.__annotations__}
    model = Model("your model", **{"kv_heads": given["heads"], **model_fields})
    layout = Layout(args.gpus, args.tensor or 1, args.expert_parallel or 1)
    try:
        check(model, layout)
    except ValueError as error:
        parser.error(str(error))
    print(table(model, [layout], args.tokens_per_gpu or TOKENS_PER_GPU, machine))


if __name__ == "__main__":
    main()
