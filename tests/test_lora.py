"""Adapters: equal merged and apart, trained alone, exported so that others load them."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_sharding import UNTIED, assert_close, assert_placed, data, whole_rows

from jaxagentrl import learner, objectives, optimizer
from jaxagentrl.models import decoder, lora, pretrained, pretrained_config, sharding
from jaxagentrl.types import TrainState

TARGETS = ("attention/(q|v)", "mlp/.*")
RANK, ALPHA = 3, 12.0


@pytest.fixture(scope="module")
def policy():
    return decoder.init(UNTIED, jax.random.key(0))


def trained(policy, seed=5):
    """Adapters whose B is not zero any more."""
    adapters = lora.init(policy, jax.random.key(1), rank=RANK, targets=TARGETS)
    key = jax.random.key(seed)

    def draw(path, leaf):
        if path[-1].key == "lora_a":
            return leaf
        return 0.05 * jax.random.normal(key, leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, adapters)


def hidden(params):
    return decoder.hidden(UNTIED, params, data()[0].tokens)


def test_fresh_adapters_change_nothing_and_merged_equals_attached(policy):
    fresh = lora.init(policy, jax.random.key(1), rank=RANK, targets=TARGETS)
    np.testing.assert_array_equal(hidden(policy), hidden(lora.attach(policy, fresh, 4.0)))
    adapters = trained(policy)
    apart = hidden(lora.attach(policy, adapters, 4.0))
    merged = lora.merge(policy, adapters, 4.0)
    assert jax.tree.structure(merged) == jax.tree.structure(policy)
    np.testing.assert_allclose(apart, hidden(merged), atol=1e-5)
    assert np.abs(apart - hidden(policy)).max() > 0.01


def test_merged_kernels_are_on_the_host(policy):
    adapters = trained(policy)
    before = jax.live_arrays()
    merged = lora.merge(policy, adapters, 4.0)
    assert len(jax.live_arrays()) <= len(before)
    for path in ("mlp/gate", "attention/q"):
        block, name = path.split("/")
        kernel, leaves = merged["layers"][block][name]["kernel"], adapters["layers"][block][name]
        assert type(kernel) is np.ndarray
        product = np.einsum("nir,nro->nio", leaves["lora_a"], leaves["lora_b"])
        expected = policy["layers"][block][name]["kernel"] + 4 * product
        np.testing.assert_allclose(kernel, expected, atol=1e-6)
    assert merged["layers"]["attention"]["k"] is policy["layers"]["attention"]["k"]


def in_sixteen_bits(params):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def test_adapters_are_added_to_a_small_base_in_float32_and_rounded_once(policy, tmp_path):
    small, adapters = in_sixteen_bits(policy), trained(policy)
    whole = lora.merge(jax.tree.map(lambda x: x.astype(jnp.float32), small), adapters, 4.0)
    for dtype in ("float32", "bfloat16"):
        merged = lora.merge(small, adapters, 4.0, dtype=dtype)
        for name in ("gate", "up", "down"):
            kernel = merged["layers"]["mlp"][name]["kernel"]
            assert kernel.dtype == dtype
            expected = whole["layers"]["mlp"][name]["kernel"].astype(dtype)
            np.testing.assert_array_equal(kernel, expected)
        assert merged["layers"]["attention"]["k"] is small["layers"]["attention"]["k"]
        # Leaves of two dtypes become files of one, and no other weight changes.
        pretrained.save(tmp_path / dtype, UNTIED, merged, dtype=dtype)
        _, read = pretrained.load(tmp_path / dtype, dtype=dtype)
        jax.tree.map(
            lambda x, y: np.testing.assert_array_equal(np.asarray(x, np.float32), y), merged, read
        )
    with pytest.raises(pretrained.PretrainedError, match="several dtypes"):
        pretrained.save(tmp_path / "two", UNTIED, lora.merge(small, adapters, 4.0))


def test_a_base_in_the_dtype_of_the_computation_trains_the_same_adapters(policy):
    """The loss and the gradient are those over the float32 base, which is rounded before it is read."""
    adapters = jax.tree.map(jnp.asarray, trained(policy))
    loss_fn = objectives.make_sft_loss(UNTIED, compute_dtype="bfloat16")

    @jax.jit
    def gradient(adapters, base):
        params = {"policy": base, "lora_scale": jnp.float32(4.0)}
        return jax.value_and_grad(lambda x: loss_fn(params | {"adapters": x}, *data())[0])(adapters)

    found, expected = (gradient(adapters, base) for base in (in_sixteen_bits(policy), policy))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_the_cached_pass_has_the_adapters_too(policy):
    params = lora.attach(policy, trained(policy), 4.0)
    tokens = data()[0].tokens[:4, :8]
    cache = decoder.init_caches(UNTIED, 4, 8, "float32", most=8)
    counts = np.full(4, 8, np.int32)
    cached, _ = decoder.hidden_cached(
        UNTIED, params, tokens, cache, None, 0 * counts, counts, filled=8
    )
    np.testing.assert_allclose(cached, decoder.hidden(UNTIED, params, tokens), atol=1e-5)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=["one device", "mesh"])
def test_only_adapters_are_trained_and_kept(policy, sizes):
    mesh = sizes and sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    chain = optimizer.make(
        learning_rate=1e-2, warmup_steps=0, decay_steps=None, final_fraction=1.0, b1=0.9, b2=0.95,
        weight_decay=0.1, max_grad_norm=1.0,
    )
    start = {"adapters": lora.init(policy, jax.random.key(1), rank=RANK, targets=TARGETS)}
    state = TrainState(jnp.int32(0), jnp.zeros((), jnp.int32), start, chain.init(start))
    frozen = {"policy": policy, "lora_scale": jnp.float32(4.0)}
    before = jax.device_get(policy)
    losses = []
    with sharding.use(mesh):
        state, frozen = (sharding.place(tree, mesh) for tree in (jax.tree.map(jnp.copy, state), frozen))
        batch, targets = sharding.place_rows(data(), mesh)
        step = learner.make_step(objectives.make_sft_loss(UNTIED), chain)
        for _ in range(4):
            state, metrics = step(state, batch, targets, whole_rows(), frozen)
            losses.append(float(metrics["loss/action"]))
    assert losses[-1] < losses[0]
    assert set(state.params) == {"adapters"}
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * decoder.num_params(state.params["adapters"])
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(frozen["policy"]))
    if mesh is not None:
        assert_placed(state, mesh)


def test_the_gradient_is_that_of_the_merged_model_projected(policy):
    """dB = s Aᵀ dW and dA = s dW Bᵀ, where dW is the merged kernel's gradient."""
    adapters, scale = trained(policy), 4.0
    batch, targets = data()
    loss_fn = objectives.make_sft_loss(UNTIED)

    def of_adapters(adapters):
        params = {"policy": policy, "lora_scale": jnp.float32(scale), "adapters": adapters}
        return loss_fn(params, batch, targets)[0]

    apart = jax.jit(jax.grad(of_adapters))(adapters)
    merged = lora.merge(policy, adapters, scale)
    whole = jax.jit(jax.grad(lambda p: loss_fn({"policy": p}, batch, targets)[0]))(merged)
    kernel = whole["layers"]["mlp"]["down"]["kernel"]
    leaves, found = adapters["layers"]["mlp"]["down"], apart["layers"]["mlp"]["down"]
    assert_close(found["lora_b"], scale * jnp.einsum("nir,nio->nro", leaves["lora_a"], kernel))
    assert_close(found["lora_a"], scale * jnp.einsum("nio,nro->nir", kernel, leaves["lora_b"]))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("spelled", ["whole", "from home"])
def test_separate_export_over_a_model_with_images(prefix, spelled, tmp_path, monkeypatch):
    """Gemma 3 from 4B up: its layers lie deeper, beside an image part with projections of like names."""
    import peft
    import their_models
    import torch
    import transformers

    text = their_models.make("gemma3").config.to_dict()
    images = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                  image_size=28, patch_size=14)
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4))
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.mul_(4.0)
    whole.save_pretrained(tmp_path / "base")
    rename_tensors(tmp_path / "base", prefix)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = "~" if spelled == "from home" else tmp_path
    config, base = pretrained.load(f"{folder}/base")
    adapters = trained(base)
    lora.save(f"{folder}/adapters", adapters, alpha=ALPHA, base=f"{folder}/base")
    said = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(tmp_path / "base")
    assert pretrained_config.layers_module(f"{folder}/base") == "model.language_model.layers"

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)   # PEFT only warns of keys that it does not find
        apart = peft.PeftModel.from_pretrained(model, tmp_path / "adapters").eval()
    assert not [name for name, _ in apart.named_parameters() if "vision" in name and "lora" in name]
    tokens = np.arange(1, 21, dtype=np.int32).reshape(2, 10)
    with torch.no_grad():
        theirs = apart(torch.tensor(tokens).long()).logits.numpy()
    ours = decoder.logits(config, lora.attach(base, adapters, ALPHA / RANK), tokens)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert np.abs(decoder.logits(config, base, tokens) - ours).max() > 0.01


def rename_tensors(folder, prefix):
    """The tensors of the language part under one of the prefixes that are in use."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for written in ("language_model.model.", "model.language_model."):
        tensors = {prefix + name.removeprefix(written) if name.startswith(written) else name: tensor
                   for name, tensor in tensors.items()}
    assert any(name.startswith(prefix) for name in tensors)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def test_settings_that_fit_nothing_are_refused(policy):
    with pytest.raises(lora.LoraError, match="'qq'"):
        lora.targeted(["q", "qq"])
    with pytest.raises(lora.LoraError, match="empty"):
        lora.targeted([])
    assert lora.targeted(["q", "mlp/up"]) == ["attention/q", "mlp/up"]
    # A pattern is one whatever is in it: either name, and not "mlp" anywhere in the path.
    assert lora.targeted(["mlp|q"]) == ["attention/q"]
    assert lora.targeted(["o|v"]) == ["attention/v", "attention/o"]
    for broken in ("(", "q)|(o"):
        with pytest.raises(lora.LoraError, match="is no regular expression"):
            lora.targeted(["q", broken])
    with pytest.raises(lora.LoraError, match=r"the text 'q', expected a list of them: write \('q',\)"):
        lora.targeted("q")
    with pytest.raises(lora.LoraError, match="lora.rank is 32"):
        lora.init(policy, jax.random.key(0), rank=32, targets=["v"])


def test_separate_export_loads_in_peft_and_equals_the_merged_export(policy, tmp_path):
    import peft
    import torch
    import transformers

    adapters = trained(policy)
    pretrained.save(tmp_path / "base", UNTIED, policy)
    pretrained.save(tmp_path / "merged", UNTIED, lora.merge(policy, adapters, ALPHA / RANK))
    lora.save(tmp_path / "adapters", adapters, alpha=ALPHA, base=str(tmp_path / "base"))
    auto = transformers.AutoModelForCausalLM
    apart = peft.PeftModel.from_pretrained(
        auto.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "adapters"
    )
    merged = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokens = data()[0].tokens[:2]
    with torch.no_grad():
        theirs = [model(torch.tensor(tokens).long()).logits.numpy() for model in (apart, merged)]
    ours = decoder.logits(UNTIED, lora.attach(policy, adapters, ALPHA / RANK), tokens)
    for logits in theirs:
        np.testing.assert_allclose(logits, ours, atol=1e-4)
