"""examples/serve.py: an FP8 checkpoint of our own making answers as autocast of the wide weights does."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle_quantize as oq
from tests.test_pretrained import model, tiny_file  # noqa: F401 (it puts examples/ on the path)

import _fp8_checkpoint as checkpoint  # isort: skip
import serve  # isort: skip


@pytest.fixture(scope="module")
def loaded(tiny_file, tmp_path_factory):  # noqa: F811
    config, params, _ = model.read(tiny_file)
    wide = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.write(folder, config, wide)
    return config, wide, folder


def test_a_checkpoint_holds_the_models_weights_in_the_published_layout(loaded):
    config, wide, folder = loaded
    read_config, params = checkpoint.read(folder)
    assert read_config == config
    described = json.loads((folder / "config.json").read_text())
    assert described["quantization_config"]["weight_block_size"] == [128, 128]
    np.testing.assert_array_equal(params["embedding"], wide["embedding"])
    for name in checkpoint.MATRICES:
        got, want = params["layers"][name], np.asarray(wide["layers"][name], np.float32)
        for i in range(config.layers):
            data, scale = oq.quantize_blocks(want[i].T, (128, 128), oq.E4M3, False)
            np.testing.assert_array_equal(
                np.asarray(got.data[i]).view(np.uint8), np.asarray(data).view(np.uint8)
            )
            np.testing.assert_array_equal(got.scale[i], scale)
    held = serve.weights(params)
    assert held["matrix_parameters"] == sum(wide["layers"][n].size for n in checkpoint.MATRICES)
    assert 1 < held["matrix_bytes_per_parameter"] <= 1.03


def test_the_checkpoint_has_the_logits_of_autocast_to_the_bit(loaded):
    config, wide, folder = loaded
    ways = serve.ways(config, wide, checkpoint.read(folder)[1])
    tokens = jnp.arange(21)[None]
    logits = {n: jax.jit(w.forward)(w.params, tokens)[0] for n, w in ways.items()}
    np.testing.assert_array_equal(logits["fp8"], logits["autocast"])
    assert np.isfinite(logits["fp8"]).all() and not np.array_equal(logits["fp8"], logits["bf16"])


def test_a_checkpoint_of_another_order_is_refused(loaded, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 128}))
    with pytest.raises(model.InputError, match="config.json has no"):
        checkpoint.read(tmp_path)


@pytest.mark.full
def test_the_job_answers_and_writes_a_summary(tiny_file, tmp_path):  # noqa: F811
    arguments = "--windows 2 --length 32 --batch 2 --generate 4"
    serve.main([*arguments.split(), "--model", str(tiny_file), "--out", str(tmp_path)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["same_tokens_fp8_and_autocast"]
    assert summary["tokens"]["fp8"] == summary["tokens"]["autocast"]
    assert all(len(t) == 4 for t in summary["tokens"]["bf16"])
    perplexity = summary["perplexity"]
    assert summary["perplexity_ratio"] == perplexity["fp8"] / perplexity["bf16"] != 1
    assert all(map(math.isfinite, perplexity.values()))
    assert summary["perplexity_tokens"] == 2 * 32
    assert summary["weights"]["bf16"]["bytes_per_parameter"] == 2
    assert summary["weights"]["fp8"]["matrix_bytes_per_parameter"] <= 1.03
    assert all(r > 0 for rates in summary["rates"].values() for r in rates.values())
