"""Every family of models against transformers: logits, weights there and back, cached decoding."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxagentrl import chat, tokenizer
from jaxagentrl.models import decoder, pretrained, pretrained_config, rope, sharding

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import their_models  # noqa: E402  (after the check that torch is there)
import their_tokenizers  # noqa: E402
from published_configs import DUMPED, PUBLISHED  # noqa: E402

# As deep models do it.
pytestmark = pytest.mark.usefixtures("looped_layers")

LENGTH = 24
TOKENS = np.random.default_rng(0).integers(1, 97, (2, LENGTH)).astype(np.int32)


# One for each family and each thing that a family may set; the others differ in leaves alone.
SCORED = ("llama_untied", "llama_3", "mistral", "mistral_window", "qwen2_untied", "qwen2_windows",
          "qwen3_windows", "gemma2", "gemma2_no_caps", "gemma3", "gemma3_seven")


@pytest.fixture(scope="module", params=SCORED)
def case(request, tmp_path_factory):
    """(name, their model, its folder, our config and parameters)."""
    model = their_models.make(request.param)
    folder = tmp_path_factory.mktemp("model") / request.param
    model.save_pretrained(folder)
    return request.param, model, folder, *pretrained.load(folder)


@pytest.fixture(scope="module")
def score(case):
    *_, config, params = case

    @jax.jit
    def run(tokens, positions, segment_ids):
        return decoder.logits(
            config, params, tokens, positions=positions, segment_ids=segment_ids)

    return run


def compare(ours, theirs, where=slice(None)):
    theirs = theirs[where]
    assert np.abs(theirs).max() > 1.0   # otherwise the tolerance would prove nothing
    np.testing.assert_allclose(np.asarray(ours)[where], theirs, atol=1e-4, rtol=0)


def plain_inputs():
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), TOKENS.shape)
    return positions, np.zeros_like(TOKENS)


def test_logits_of_padded_rows(case, score):
    _, model, *_ = case
    positions, segments = plain_inputs()
    real = np.ones_like(TOKENS)
    real[1, 17:] = 0
    theirs = their_models.logits(model, TOKENS, attention_mask=real)
    compare(score(TOKENS, positions, segments), theirs, real == 1)

    # On the left, as generation pads: there the padding is a segment of its own.
    real = real[:, ::-1].copy()
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    theirs = their_models.logits(model, TOKENS, attention_mask=real, position_ids=positions)
    compare(score(TOKENS, positions, 1 - real), theirs, real == 1)


def test_logits_of_packed_rows(case, score):
    _, model, *_ = case
    lengths = (7, 12, 5)
    row = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    positions = np.broadcast_to(row, TOKENS.shape)
    segments = np.broadcast_to(np.repeat(np.arange(3), lengths), TOKENS.shape).astype(np.int32)
    # Without a mask transformers finds the sequences by where positions start again.
    theirs = their_models.logits(model, TOKENS, position_ids=positions, use_cache=False)
    compare(score(TOKENS, positions, segments), theirs)


@pytest.mark.parametrize("stride", [1, 1000])
def test_logits_at_long_positions(case, score, stride):
    _, model, *_ = case
    positions, segments = plain_inputs()
    positions = (40_000 - LENGTH * stride + stride * positions).astype(np.int32)
    theirs = their_models.logits(
        model, TOKENS, position_ids=positions, attention_mask=np.ones_like(TOKENS))
    compare(score(TOKENS, positions, segments), theirs)


def test_decoding_with_a_cache_equals_scoring(case, score):
    """Teacher forcing through the cache, in pieces that cross the window, one token at a time last."""
    *_, config, params = case
    whole = score(TOKENS, *plain_inputs())
    cache = decoder.init_caches(config, 2, 32, "float32", most=9)
    append = jax.jit(
        lambda tokens, cache, start: decoder.hidden_cached(
            config, params, tokens, cache, None, jnp.full(2, start),
            jnp.full(2, tokens.shape[1]), filled=32))
    start = 0
    for width in (9, 9, 1, 1, 1, 1, 1, 1):
        x, cache = append(TOKENS[:, start:start + width], cache, start)
        z = decoder.unembed(params, x, softcap=config.logit_softcap)
        np.testing.assert_allclose(z, whole[:, start:start + width], atol=1e-4, rtol=0)
        start += width
    assert start == LENGTH


def test_weights_come_back_bit_for_bit(case, tmp_path):
    _, model, folder, config, params = case
    expected = jax.eval_shape(lambda key: decoder.init(config, key), jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    pretrained.save(tmp_path / "ours", config, params)
    config_again, params_again = pretrained.load(tmp_path / "ours")
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, params, params_again)
    theirs = safetensors.numpy.load_file(folder / "model.safetensors")
    ours = safetensors.numpy.load_file(tmp_path / "ours" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_array_equal(theirs[name], ours[name])
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager")
    np.testing.assert_array_equal(
        their_models.logits(again, TOKENS), their_models.logits(model, TOKENS))


def test_the_other_spelling_of_settings(case, tmp_path):
    """What transformers 4 wrote: rope_theta and rope_scaling, patterns instead of lists."""
    name, _, folder, config, _ = case
    settings = json.loads((folder / "config.json").read_text())
    rotations = settings.pop("rope_parameters")
    assert "rope_theta" not in settings
    full = dict(rotations.get("full_attention", rotations))
    settings["rope_theta"] = full.pop("rope_theta")
    settings["rope_scaling"] = None if full["rope_type"] == "default" else full
    if "sliding_attention" in rotations:
        settings["rope_local_base_freq"] = rotations["sliding_attention"]["rope_theta"]
    kinds = settings.pop("layer_types", None)
    if name in ("qwen3_windows", "gemma2_no_caps", "gemma3"):   # no older key could say it
        settings["layer_types"] = kinds
    if name == "gemma3_seven":
        settings["sliding_window_pattern"] = 6
    settings["torch_dtype"] = settings.pop("dtype")
    if settings["rope_scaling"] and "rope_local_base_freq" not in settings:   # in Gemma 3 nobody reads it
        settings["rope_scaling"]["type"] = settings["rope_scaling"].pop("rope_type")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert pretrained_config.read_config(tmp_path) == config


def test_a_mesh_changes_nothing(tmp_path):
    """The family with the most settings, its parameters and activations split in both ways."""
    model = their_models.make("gemma3")
    model.save_pretrained(tmp_path)
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    config, params = pretrained.load(tmp_path, mesh=mesh)
    with sharding.use(mesh):
        ours = jax.jit(lambda params, tokens: decoder.logits(config, params, tokens))(
            params, TOKENS)
    compare(ours, their_models.logits(model, TOKENS))


@pytest.mark.parametrize("options", [
    their_models.PLAIN, their_models.LLAMA3, their_models.YARN, their_models.LINEAR,
    their_models.YARN | {"attention_factor": 1.25, "beta_fast": 16.0, "truncate": False},
])
def test_frequencies_equal_theirs(options):
    config = transformers.LlamaConfig(head_dim=128, rope_parameters=dict(options),
                                      max_position_embeddings=40_960)
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    values = {name: value for name, value in options.items() if name != "rope_theta"}
    scaling = None if values["rope_type"] == "default" else rope.Scaling(**values)
    ours, factor = rope.frequencies(128, options["rope_theta"], scaling)
    np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=3e-7)
    assert factor == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize("name, words", [
    ("llama_3", "llama3"), ("mistral_window", "mistral_v3"), ("qwen2_tied", "qwen2.5"),
    ("qwen3", "qwen3"), ("gemma2", "gemma2"), ("gemma3", "gemma3"),
])
def test_exports_say_the_same_in_transformers(name, words, tmp_path):
    """Tokenizer, template, weights and where to stop, through files alone."""
    made = tokenizer.load(their_tokenizers.make(words, tmp_path / "tokenizer"))
    format = chat.make(made)
    their_models.make(name, vocab_size=len(made)).save_pretrained(tmp_path / "first")
    config, params = pretrained.load(tmp_path / "first")
    pretrained.save(tmp_path / "model", config, params, tokenizer=made,
                    stop_ids=(format.end_of_turn_id,))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation="eager").eval()
    ends = theirs.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    assert format.end_of_turn_id in ends
    their_words = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    question = [{"role": "user", "content": "There is a closed Z-box here."}]
    prompt = their_words.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True,
        date_string="26 Jul 2024")["input_ids"]
    ids = format.first_prompt(question[0]["content"]).tolist()
    assert prompt[0].tolist() == ids
    said = theirs.generate(prompt, max_new_tokens=16, do_sample=False)[0, len(ids):].tolist()

    step = jax.jit(lambda tokens, cache, start: decoder.hidden_cached(
        config, params, tokens, cache, None, start[None], jnp.full(1, tokens.shape[1]), filled=128))
    cache = decoder.init_caches(config, 1, 128, "float32", most=len(ids))
    tokens, start, ours = np.array([ids], np.int32), 0, []
    while len(ours) < 16 and not set(ours) & set(ends):
        x, cache = step(tokens, cache, jnp.int32(start))
        start += tokens.shape[1]
        z = decoder.unembed(params, x[0, -1], softcap=config.logit_softcap)
        ours.append(int(jnp.argmax(z)))
        tokens = np.array([[ours[-1]]], np.int32)
    assert ours == said
    assert their_words.decode(said) == made.decode(ours)


def test_settings_that_no_family_has_together_are_refused_on_export(tmp_path):
    config = decoder.DecoderConfig(
        vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        intermediate_size=48, qk_norm=True, attention_softcap=3.0)
    shapes = jax.eval_shape(lambda key: decoder.init(config, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    with pytest.raises(pretrained.PretrainedError, match="qwen3.*attention_softcap.*3.0"):
        pretrained.save(tmp_path / "model", config, params)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name, tmp_path):
    settings, expected = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = pretrained_config.read_config(tmp_path)
    assert {key: getattr(config, key) for key in expected} == expected
    written = pretrained_config.to_json(config, "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(written))
    again = pretrained_config.read_config(tmp_path)
    assert again == config
    assert again.max_position_embeddings == config.max_position_embeddings
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    kind = settings["model_type"]
    assert theirs.model_type == {"gemma3": "gemma3_text"}.get(kind, kind) == again.model_type


def test_a_config_with_every_key_of_transformers_4_is_read(tmp_path):
    """How answers are drawn says nothing of the logits; heads that were taken out do."""
    numbers = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
               "intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings",
               "tie_word_embeddings", "model_type", "rope_theta")
    found = []
    for settings in (DUMPED, {key: DUMPED[key] for key in numbers}):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        found.append(pretrained_config.read_config(tmp_path))
    assert found[0] == found[1]
    assert found[0].max_position_embeddings == found[1].max_position_embeddings == 4096
    (tmp_path / "config.json").write_text(json.dumps(DUMPED | {"pruned_heads": {"0": [1]}}))
    with pytest.raises(pretrained.PretrainedError, match="pruned_heads is {'0': .1.}, expected {}"):
        pretrained_config.read_config(tmp_path)


def test_what_says_nothing_of_the_numbers_is_kept_beside_them(tmp_path):
    """The longest text is known of a model that was read; of one made here where it is set."""
    sizes = dict(vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                 intermediate_size=48)
    made = decoder.DecoderConfig(**sizes)
    assert made.max_position_embeddings is None and made.model_type is None
    for config, length in ((made, 32_768), (decoder.DecoderConfig(
            **sizes, max_position_embeddings=777), 777)):
        settings = pretrained_config.to_json(config, "float32")
        assert settings["model_type"] == "llama"
        (tmp_path / "config.json").write_text(json.dumps(settings))
        again = pretrained_config.read_config(tmp_path)
        assert (again.max_position_embeddings, again.model_type) == (length, "llama")
        # Neither has programs compiled anew.
        assert again == config == made and hash(again) == hash(made)


def test_a_family_is_kept_only_where_it_fits():
    sizes = dict(vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                 intermediate_size=48, model_type="mistral")
    kept = pretrained_config.to_json(decoder.DecoderConfig(**sizes), "float32")
    assert (kept["model_type"], kept["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert kept["sliding_window"] is None
    other = pretrained_config.to_json(decoder.DecoderConfig(**sizes, qk_norm=True), "float32")
    assert other["model_type"] == "qwen3"


@pytest.mark.parametrize("changes, expected", [
    (dict(sliding_window_size=4096), 4096),
    (dict(sliding_window=..., sliding_window_size=1024), 1024),
    (dict(sliding_window_size=1024), "sliding_window_size is 1024, expected that of sliding_window, 4096"),
    (dict(sliding_window=None, sliding_window_size=4096), "sliding_window_size is 4096, expected .* None"),
])
def test_the_first_name_of_gemma2s_window(changes, expected, tmp_path):
    settings = PUBLISHED["gemma-2-2b-it"][0] | changes
    settings = {key: value for key, value in settings.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    if isinstance(expected, int):
        assert pretrained_config.read_config(tmp_path).sliding_window == expected
        return
    with pytest.raises(pretrained.PretrainedError, match=expected):
        pretrained_config.read_config(tmp_path)


def test_gemma_exports_are_spelled_for_older_readers(tmp_path):
    """vLLM on transformers 4: hidden_act of Gemma 2, no rotations per kind of layer of Gemma 3."""
    written = {}
    for name in ("gemma2", "gemma3", "gemma3_seven"):
        (tmp_path / "config.json").write_text(json.dumps(their_models.make(name).config.to_dict()))
        written[name] = pretrained_config.to_json(
            pretrained_config.read_config(tmp_path), "float32")
    assert written["gemma2"]["hidden_act"] == written["gemma2"]["hidden_activation"]
    assert "hidden_act" not in written["gemma3"]
    for name in ("gemma3", "gemma3_seven"):
        assert "rope_parameters" not in written[name]
        assert written[name]["rope_local_base_freq"] == 1e4
    assert written["gemma3"]["rope_theta"] == 1e6
    assert written["gemma3"]["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_a_scaled_gemma3_with_windows_everywhere_keeps_its_scaling(tmp_path):
    """Which the older spelling would give to the layers without a window alone."""
    config = decoder.DecoderConfig(
        vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        intermediate_size=48, sliding_window=4, qk_norm=True, activation="gelu_tanh",
        norm_plus_one=True, post_norms=True, scale_embeddings=True, query_scale_dim=8.0,
        rope_scaling=rope.Scaling("linear", 8.0))
    (tmp_path / "config.json").write_text(json.dumps(pretrained_config.to_json(config, "float32")))
    assert pretrained_config.read_config(tmp_path) == config


@pytest.mark.parametrize("changes, named", [
    (dict(layer_types=["chunked_attention"] * 3), "chunked_attention"),
    (dict(layer_types=["full_attention"] * 2), "layer_types has 2 entries"),
    (dict(attn_logit_softcapping=30.0), "attn_logit_softcapping is 30.0"),
    (dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    (dict(hidden_activation="gelu"), "hidden_activation is 'gelu'"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), "disagree"),
    (dict(rope_parameters={"full_attention": their_models.PLAIN,
                           "sliding_attention": their_models.LINEAR}),
     "rope_parameters.sliding_attention.rope_type is 'linear'"),
    (dict(query_pre_attn_scalar=-1), "query_pre_attn_scalar must be positive"),
    (dict(attention_bias=True), "attention_bias is True"),
    (dict(rope_parameters={"full_attention": their_models.YARN | {"truncate": False},
                           "sliding_attention": their_models.PLAIN}),
     "rope_parameters.full_attention.truncate is False, which transformers passes over"),
    (dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 8.0}),
     "rope_scaling.type is 'linear', which transformers passes over.* rope_type"),
    (dict(rope_parameters=None, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}),
     "rope_scaling.truncate is False, which transformers passes over"),
])
def test_unsupported_settings_of_gemma3_are_named(changes, named, tmp_path):
    settings = their_models.make("gemma3").config.to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(pretrained.PretrainedError, match=named) as caught:
        pretrained_config.read_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case, changes, named", [
    ("qwen2_tied", dict(layer_types=["sliding_attention"] * 3), "there is no window"),
    ("mistral_window", dict(layer_types=their_models.WINDOW), "mistral cannot have"),
    ("llama_tied", dict(layer_types=["sliding_attention"] * 3), "there is no window"),
    ("llama_3", dict(rope_parameters={"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}),
     "rope_parameters.low_freq_factor is missing"),
    ("qwen2_untied", dict(rope_parameters=their_models.YARN | {"mscale": 0.7}),
     "rope_parameters.mscale is 0.7"),
    ("qwen3", dict(rope_parameters={"full_attention": their_models.PLAIN}), "only Gemma 3 has"),
])
def test_windows_and_rotations_that_do_not_fit_are_named(case, changes, named, tmp_path):
    settings = their_models.make(case).config.to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(pretrained.PretrainedError, match=named):
        pretrained_config.read_config(tmp_path)


def config_json(**changes):
    """A plain Llama's settings."""
    settings = dict(
        model_type="llama", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, rms_norm_eps=1e-6, max_position_embeddings=512,
    )
    return {key: value for key, value in (settings | changes).items() if value != "absent"}


@pytest.mark.parametrize("changes, named", [
    (dict(max_position_embeddings=None), "max_position_embeddings is missing"),
    (dict(hidden_size="32"), "hidden_size is '32', expected a number"),
    (dict(num_hidden_layers=0), "num_hidden_layers is 0, expected a positive integer"),
    (dict(num_key_value_heads=3), r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
    (dict(rope_scaling="linear"), "rope_scaling is 'linear', expected an object"),
    (dict(rope_scaling={"rope_type": "linear", "factor": "8"}), "rope_scaling.factor is '8', expected a number"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0, "beta_slow": 0}), "yarn needs beta_slow above 0"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
     "llama3 needs low_freq_factor"),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": 5e4},
          rope_scaling={"type": "linear", "factor": 2.0}),
     r"rope_scaling stands in the place of rope_parameters.*50000\.0"),
    (dict(hidden_size=32.0), "hidden_size is 32.0, expected a positive integer"),
    (dict(model_type=["llama"]), r"model_type is \['llama'\], expected one of"),
    (dict(model_type="qwen2", use_sliding_window="false", sliding_window=8),
     "use_sliding_window is 'false', expected true or false"),
    (dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false', expected true or false"),
    (dict(rope_theta=0), "rope_theta is 0, expected more"),
    (dict(model_type="mistral", sliding_window=8.5), "sliding_window is 8.5, expected a positive integer"),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=None),
     "max_window_layers is missing"),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers="1"),
     "max_window_layers is '1', expected a number"),
    (dict(model_type="qwen2", layer_types=3), "layer_types is 3, expected a list"),
    (dict(model_type="gemma3_text", query_pre_attn_scalar=None), "query_pre_attn_scalar is missing"),
    (dict(model_type="gemma3_text", rope_parameters={"full_attention": 5}),
     "rope_parameters.full_attention is 5, expected an object"),
    (dict(model_type="gemma3_text", sliding_window_pattern="6"), "sliding_window_pattern is '6', expected a number"),
])
def test_strange_values_are_named_as_the_file_has_them(changes, named, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json(**changes)))
    with pytest.raises(pretrained.PretrainedError, match=named):
        pretrained_config.read_config(tmp_path)


def test_a_factor_of_one_says_nothing_and_a_flat_rotation_is_none_of_gemma3(tmp_path):
    neutral = {"rope_type": "default", "rope_theta": 5e4, "factor": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(config_json(rope_parameters=neutral)))
    assert pretrained_config.read_config(tmp_path).rope_theta == 5e4
    settings = their_models.make("gemma3").config.to_dict() | {"rope_parameters": neutral}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(pretrained.PretrainedError, match="an entry for each of"):
        pretrained_config.read_config(tmp_path)


GEMMA3 = dict(
    activation="gelu_tanh", norm_plus_one=True, post_norms=True, scale_embeddings=True, qk_norm=True
)


@pytest.mark.parametrize("settings, model_type", [
    # Heads that do not share out the hidden size, which Llama's and Gemma's configs refuse.
    (dict(hidden_size=40, num_heads=3, num_kv_heads=3), "mistral"),
    (dict(hidden_size=40, num_heads=3, num_kv_heads=3, qk_norm=True), "qwen3"),
    # No window, where transformers wants the size of one.
    (GEMMA3, "gemma3_text"),
    # One scaled rotation in both kinds of layer.
    (GEMMA3 | dict(sliding_window=5, window_layers=(True, False),
                   rope_scaling=rope.Scaling("linear", factor=8.0)), "gemma3_text"),
], ids=["three heads", "three heads, normed", "gemma 3 without windows", "gemma 3 scaled alike"])
def test_what_is_exported_is_what_transformers_computes(settings, model_type, tmp_path):
    plain = dict(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                 intermediate_size=48, rope_theta=100.0)
    config = decoder.DecoderConfig(**plain | settings)
    params = decoder.init(config, jax.random.key(0))
    pretrained.save(tmp_path, config, params)
    again, _ = pretrained.load(tmp_path)
    assert again.model_type == model_type
    same = dict(model_type=None, max_position_embeddings=None, query_scale_dim=None)
    assert dataclasses.replace(again, **same) == dataclasses.replace(config, **same)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = np.random.default_rng(0).integers(0, 64, (2, 20))
    ours = decoder.logits(config, params, jnp.asarray(ids, jnp.int32))
    np.testing.assert_allclose(ours, their_models.logits(theirs, ids), atol=1e-4)


def test_a_query_scale_that_no_config_json_can_say_is_not_exported():
    config = decoder.DecoderConfig(
        **dict(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
               intermediate_size=48, query_scale_dim=12.5), **GEMMA3)
    with pytest.raises(pretrained.PretrainedError, match="query_scale_dim.*12.5"):
        pretrained_config.to_json(config, "float32")


def test_what_transformers_passes_over_in_a_gemma3_is_not_exported():
    """The truncation of YARN, of which it makes the usual one."""
    yarn = rope.Scaling("yarn", 4.0, original_max_position_embeddings=16, truncate=False)
    settings = dict(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                    intermediate_size=48, sliding_window=5, window_layers=(True, False), local_rope_theta=100.0,
                    rope_scaling=yarn)
    with pytest.raises(pretrained.PretrainedError, match="rope_scaling.truncate.*False"):
        pretrained_config.to_json(decoder.DecoderConfig(**settings, **GEMMA3), "float32")
    theirs = transformers.Gemma3TextConfig(head_dim=32, rope_parameters={
        "full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0, "truncate": False,
                           "original_max_position_embeddings": 16},
        "sliding_attention": their_models.PLAIN})
    made = transformers.models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding(theirs).full_attention_inv_freq
    usual, _ = rope.frequencies(32, 100.0, dataclasses.replace(yarn, truncate=True))
    np.testing.assert_allclose(made.numpy(), usual, rtol=3e-7)
    assert np.any(rope.frequencies(32, 100.0, yarn)[0] != usual)
