"""A Llama's parameters as an FP8 checkpoint in the published layout, and back.

Matrices of the layers are E4M3 in 128x128 blocks; the embedding, which is also the head, and the norms stay wide, as in
the checkpoints that are published. Names are those of Llama in Hugging Face's transformers. Queries and keys keep the
order of GGUF, in which neighbours are rotated together: `config.json` says so by `rope_interleave`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
from _smollm2_model import Config, InputError, Params

import jaxfp8
import jaxfp8.safetensors

MATRICES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "attention_out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "feed_forward": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocabulary": "vocab_size",
    "rope_base": "rope_theta",
    "epsilon": "rms_norm_eps",
}


def write(path: pathlib.Path, config: Config, params: Params) -> None:
    """Quantizes the layers' matrices (layers, in, out) and writes a folder that `read` takes."""

    @jax.jit
    def quantize(w):
        return jaxfp8.quantize(w.T, (128, 128))

    tensors = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["norm"],
    }
    for i in range(config.layers):
        for ours, theirs in MATRICES.items():
            tensors[f"model.layers.{i}.{theirs}.weight"] = quantize(params["layers"][ours][i])
        for ours, theirs in NORMS.items():
            tensors[f"model.layers.{i}.{theirs}.weight"] = params["layers"][ours][i]
    sizes = dataclasses.asdict(config)
    described = {theirs: sizes[ours] for ours, theirs in SIZES.items()}
    described |= {"model_type": "llama", "tie_word_embeddings": True, "rope_interleave": True}
    jaxfp8.safetensors.save(tensors, path, config=described)


def read(path: pathlib.Path) -> tuple[Config, Params]:
    """Configuration and parameters; matrices are QuantizedArrays (layers, out, in)."""
    described = json.loads((path / "config.json").read_text())
    if missing := {*SIZES.values(), "rope_interleave"} - described.keys():
        raise InputError(f"{path}/config.json has no {min(missing)}; allowed: what this job writes")
    config = Config(**{ours: described[theirs] for ours, theirs in SIZES.items()})
    tensors = jaxfp8.safetensors.load(path)

    def stack(name: str):
        # Taken out of the dict, so that a layer's tensors go as soon as they are stacked.
        of_layers = [tensors.pop(f"model.layers.{i}.{name}.weight") for i in range(config.layers)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_layers)

    layers = {ours: stack(theirs) for ours, theirs in (MATRICES | NORMS).items()}
    return config, {
        "embedding": tensors["model.embed_tokens.weight"],
        "layers": layers,
        "norm": tensors["model.norm.weight"],
    }
