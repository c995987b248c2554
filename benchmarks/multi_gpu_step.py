"""The training step of step.py on N GPUs: efficiency against one GPU with as many tokens each, and FP8's lead kept."""

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import optax
import step
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from multi_gpu_common import communication, on_mesh, queued

import jaxfp8

AXIS = "gpu"
SIDES = {"bf16": "bf16", "fp8": "mlp"}
"""Names of step.py's variants."""

WIDTH_CUT = {"q": 1, "kv": 1, "o": 2, "up": 1, "down": 2, "embedding": 1, "head": 0}
"""The axis of the model's width, which FSDP cuts; after the layers'."""
HIDDEN_CUT = {"q": 2, "kv": 2, "o": 1, "up": 3, "down": 1}
"""Of heads and hidden units, which tensor parallelism cuts."""


def specs_of(tree, cut):
    """A PartitionSpec for each array, by its name: parameters, and the optimizer's moments alike."""

    def spec(path, x):
        names = [getattr(k, "key", None) for k in path]
        axis = next((cut[n] for n in names if n in cut), None)
        return P(*[AXIS if i == axis else None for i in range(x.ndim)])

    return jax.tree_util.tree_map_with_path(spec, tree)


# ---- Ways to cut the step: a loss of parameters and tokens, and the axes of the weights that are cut


def held(mesh, *axes):
    """Holds activations to a sharding, as trainers do in every layer: without it XLA may gather them."""
    return lambda x: lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))


def data(model, variant, mesh):
    """Tokens cut on automatic axes, every weight everywhere."""
    dot, mlp, wrap = step.VARIANTS[variant]
    hold = held(mesh, AXIS)
    loss = functools.partial(
        step.loss,
        model,
        lambda x, w: hold(dot(hold(x), w)),
        lambda x, up, down: hold(mlp(hold(x), up, down)),
        None,
    )
    return wrap(loss), {}


def fsdp(model, variant, mesh):
    """Weights cut too, on the model's width; XLA gathers them."""
    return data(model, variant, mesh)[0], WIDTH_CUT


def fsdp_shard_map(model, variant, mesh):
    """Each layer's weights gathered in front of their products, their gradients scattered."""
    dot, mlp, _ = step.VARIANTS[variant]

    def gathered(w, axis):
        if variant == "bf16":
            return lax.all_gather(w.astype(jnp.bfloat16), AXIS, axis=axis % w.ndim, tiled=True)
        return jaxfp8.all_gather_weight(w, AXIS, axis=axis)

    def cut_mlp(x, up, down):
        flat = gathered(up.reshape(up.shape[0], -1), -2)
        up = flat.reshape(x.shape[-1], 2, -1) if variant == "bf16" else flat
        return mlp(x, up, gathered(down, -1))

    def local(params, tokens):
        ends = {"embedding": 1, "head": 0}
        whole = {
            k: lax.all_gather(params[k].astype(jnp.bfloat16), AXIS, axis=a, tiled=True)
            for k, a in ends.items()
        }
        loss = step.loss(
            model,
            lambda x, w: dot(x, gathered(w, -2)),
            cut_mlp,
            None,
            params | whole,
            tokens,
            out_dot=lambda x, w: dot(x, gathered(w, -1)),
        )
        return lax.pmean(loss, AXIS)

    def loss(params, tokens):
        specs = specs_of(params, WIDTH_CUT)
        f = jax.shard_map(local, mesh=mesh, in_specs=(specs, P(AXIS)), out_specs=P())
        return f(params, tokens)

    return loss, WIDTH_CUT


def tensor(model, variant, mesh):
    """Heads and hidden units cut; outside of attention and the MLP, tokens. Automatic axes, and products apart."""
    dot, _, _ = step.VARIANTS["bf16" if variant == "bf16" else "linear"]
    tokens, columns = held(mesh, AXIS), held(mesh, None, None, AXIS)

    def mlp(x, up, down):
        gate, value = (columns(dot(tokens(x), up[:, i])) for i in range(2))
        return tokens(dot(columns(jax.nn.silu(gate) * value), down))

    loss = functools.partial(
        step.loss,
        model,
        lambda x, w: columns(dot(tokens(x), w)),
        mlp,
        None,
        out_dot=lambda x, w: tokens(dot(columns(x), w)),
    )
    return loss, HIDDEN_CUT


LAYOUTS = {
    "data": data,
    "FSDP, automatic": fsdp,
    "FSDP, shard_map": fsdp_shard_map,
    "tensor and sequence": tensor,
}


# ---- Measurement


def compiled_step(loss, optimizer, state, tokens, shardings=None):
    """(params, optimizer's state), tokens -> the same, loss; the state stays where it is."""

    def run(state, tokens):
        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    out = None if shardings is None else (shardings, None)
    return jax.jit(run, donate_argnums=0, out_shardings=out).lower(state, tokens).compile()


def take_turns(programs, state, tokens, rounds=4, calls=5):
    """Median milliseconds a step, the first loss from one state, and what communication takes, by side."""
    times, found = {side: [] for side in programs}, {}
    for side, run in programs.items():
        _, value = run(jax.tree.map(jnp.copy, state), tokens)
        found[side] = {"loss": float(value)}
    for _ in range(rounds):
        for side, run in programs.items():
            start = time.perf_counter()
            for _ in range(calls):
                state, value = queued(functools.partial(run, state, tokens))()
            jax.block_until_ready(value)
            times[side].append((time.perf_counter() - start) / calls)
    for side, run in programs.items():

        def once(run=run):
            nonlocal state
            state, value = queued(functools.partial(run, state, tokens))()
            return value

        moved = communication(once) if len(tokens.sharding.device_set) > 1 else None
        found[side] |= {"ms": 1e3 * statistics.median(times[side])} | (moved or {})
    return found


def measure_layout(name, model, optimizer, devices):
    """Both sides of a layout; None: one GPU."""
    mesh = on_mesh(devices, AXIS)

    def init(key):
        params = step.init(model, key)
        return params, optimizer.init(params)

    shape = model.batch, model.sequence + 1
    tokens = jax.random.randint(jax.random.key(1), shape, 0, model.vocabulary)
    key, shardings = jax.random.key(0), None
    losses = {}
    for side, variant in SIDES.items():
        if name is None:
            dot, mlp, wrap = step.VARIANTS[variant]
            losses[side], cut = wrap(functools.partial(step.loss, model, dot, mlp, None)), {}
        else:
            losses[side], cut = LAYOUTS[name](model, variant, mesh)
    if name is not None:
        specs = specs_of(jax.eval_shape(init, key), cut)
        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
        tokens = jax.device_put(tokens, NamedSharding(mesh, P(AXIS)))
    state = jax.jit(init, out_shardings=shardings)(key)
    programs = {
        side: compiled_step(loss, optimizer, state, tokens, shardings)
        for side, loss in losses.items()
    }
    return take_turns(programs, state, tokens)


def add_efficiency(row, one):
    """Against one GPU with the same tokens each, and how much of FP8's lead is kept."""
    for side in SIDES:
        row[side]["efficiency"] = one[side]["ms"] / row[side]["ms"]
    lead, kept = (r["bf16"]["ms"] / r["fp8"]["ms"] for r in (one, row))
    row |= {"fp8_lead": kept, "lead_kept": kept / lead}


def print_row(row):
    cells = []
    for side in SIDES:
        r = row[side]
        cell = f"{side} {r['ms']:7.1f} ms, loss {r['loss']:.4f}"
        cell += f", efficiency {r['efficiency']:.3f}" if "efficiency" in r else ""
        if "exposed_ms" in r:
            cell += f", communication {r['communication_ms']:.1f} of which {r['exposed_ms']:.1f} exposed"
        cells.append(cell)
    lead = f"lead {row['bf16']['ms'] / row['fp8']['ms']:.3f}"
    lead += f", kept {row['lead_kept']:.3f}" if "lead_kept" in row else ""
    print(f"{row['layout']:22} {'; '.join(cells)}; {lead}", flush=True)


def measure(arguments, budget):
    devices = arguments.devices
    one_model = step.TINY if arguments.tiny else step.Model()
    many_model = dataclasses.replace(one_model, batch=one_model.batch * devices)
    optimizer = optax.adamw(1e-4, b2=0.95, weight_decay=0.1)
    rows, one = [], None
    for name in (None, *LAYOUTS):
        label = name or "one GPU"
        if not budget.allows(75, f"step, {label}"):
            continue
        model = one_model if name is None else many_model
        row = {"layout": label, "model": dataclasses.asdict(model)}
        row |= measure_layout(name, model, optimizer, devices)
        if name is None:
            one = row
        elif one is not None:
            add_efficiency(row, one)
        rows.append(row)
        print_row(row)
    return rows
