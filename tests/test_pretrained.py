"""Model folders: parity with transformers, exact round trips, and errors that list everything."""

import functools
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxagentrl import tokenizer as tokenizer_lib
from jaxagentrl.models import decoder, pretrained, sharding, tensor_files, weights_out

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import their_models  # noqa: E402  (after the check that torch is there)

TOKENS = np.array([[1, 5, 90, 33, 2, 7, 7, 64], [96, 0, 4, 4, 18, 50, 3, 21]], np.int32)
CASES = ("llama_tied", "llama_untied", "qwen2_tied", "qwen2_untied")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder per case, written by transformers itself."""
    root = tmp_path_factory.mktemp("models")
    for case in CASES:
        their_models.make(case).save_pretrained(root / case)
    return root


def edit_config(folder, **changes):
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    for key, value in changes.items():
        settings.pop(key, None)
        if value is not ...:
            settings[key] = value
    path.write_text(json.dumps(settings))


def copy_of(folder, tmp_path):
    target = tmp_path / folder.name
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("case", ["llama_untied", "qwen2_tied"])
def test_bfloat16_round_trip(case, folders, tmp_path):
    config, params = pretrained.load(folders / case, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    pretrained.save(tmp_path / "half", config, params)
    _, again = pretrained.load(tmp_path / "half", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, params, again)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16


def test_float32_parameters_are_stored_in_sixteen_bits_if_asked(folders, tmp_path):
    case = sorted(path.name for path in folders.iterdir())[0]
    config, params = pretrained.load(folders / case)
    pretrained.save(tmp_path / "half", config, params, dtype="bfloat16")
    said = json.loads((tmp_path / "half" / "config.json").read_text())
    assert said.get("dtype", said.get("torch_dtype")) == "bfloat16"
    weights, whole = (sum(path.stat().st_size for path in folder.glob("*.safetensors"))
                      for folder in (tmp_path / "half", folders / case))
    assert weights < 0.6 * whole
    _, again = pretrained.load(tmp_path / "half")
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), params)
    jax.tree.map(np.testing.assert_array_equal, rounded, again)


@pytest.mark.parametrize("max_shard_bytes", [1, 20_000])
def test_sharded_folder_loads_here_and_there(max_shard_bytes, folders, tmp_path):
    config, params = pretrained.load(folders / "qwen2_untied")
    pretrained.save(tmp_path / "sharded", config, params, max_shard_bytes=max_shard_bytes)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    _, again = pretrained.load(tmp_path / "sharded")
    jax.tree.map(np.testing.assert_array_equal, params, again)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "sharded", attn_implementation="eager").eval()
    np.testing.assert_array_equal(
        their_models.logits(model, TOKENS),
        their_models.logits(their_models.make("qwen2_untied"), TOKENS))


def test_shards_written_by_transformers(tmp_path):
    model = their_models.make("llama_tied")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    config, params = pretrained.load(tmp_path / "theirs")
    logits = decoder.logits(config, params, jnp.asarray(TOKENS))
    np.testing.assert_allclose(logits, their_models.logits(model, TOKENS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention_bias", [False, True])
def test_export_generates_the_same_text(attention_bias, tmp_path):
    text = ["go north", "take the key from the table", "open the wooden door with the key"] * 4
    tokenizer = tokenizer_lib.train(text, vocab_size=300, directory=tmp_path / "tokenizer")
    config = decoder.DecoderConfig(
        vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        intermediate_size=64, attention_bias=attention_bias, tie_embeddings=False)
    params = jax.tree.map(lambda leaf: 3 * leaf, decoder.init(config, jax.random.key(1)))
    pretrained.save(tmp_path / "model", config, params, tokenizer=tokenizer)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    prompt = their_tokenizer("take the key", return_tensors="pt").input_ids
    assert prompt[0].tolist() == tokenizer("take the key").input_ids
    generated = theirs.generate(prompt, max_new_tokens=12)[0].tolist()

    score = jax.jit(lambda tokens: decoder.logits(config, params, tokens))
    ids = prompt[0].tolist()
    while len(ids) < len(prompt[0]) + 12 and ids[-1] != tokenizer.eos_token_id:
        padded = np.zeros((1, 64), np.int32)
        padded[0, :len(ids)] = ids
        ids.append(int(jnp.argmax(score(padded)[0, len(ids) - 1])))
    assert generated == ids
    assert their_tokenizer.decode(generated) == tokenizer.decode(ids)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id


# eos_token_id as published: in generation_config.json, in config.json, and what is to come of them.
STOPS = {
    "Qwen2.5-0.5B-Instruct": ([151645, 151643], 151645, (151645, 151643)),
    "Llama-3.2-1B-Instruct": ([128001, 128008, 128009], [128001, 128008, 128009],
                              (128001, 128008, 128009)),
    "Mistral-7B-Instruct-v0.3": (2, 2, (2,)),
    "no generation_config.json": (None, [2, 7], (2, 7)),
    "neither": (None, None, ()),
}


@pytest.mark.parametrize("name", STOPS)
def test_where_the_publisher_stops(name, tmp_path):
    generation, config, expected = STOPS[name]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    assert pretrained.stop_ids(tmp_path) == (
        () if config is None else tuple(config) if isinstance(config, list) else (config,))
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "eos_token_id": generation}))
    assert pretrained.stop_ids(tmp_path) == expected


def test_where_a_model_with_images_stops(tmp_path):
    whole = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": {"eos_token_id": 1}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert pretrained.stop_ids(tmp_path) == (1, 106)
    del whole["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert pretrained.stop_ids(tmp_path) == (1,)


@pytest.mark.parametrize("said", ["</s>", [1, None], True, -1, {"id": 3}])
def test_what_is_no_id_is_named(said, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    with pytest.raises(pretrained.PretrainedError, match="generation_config.json: eos_token_id is"):
        pretrained.stop_ids(tmp_path)
    with pytest.raises(pretrained.PretrainedError, match="config.json does not exist"):
        pretrained.stop_ids(tmp_path / "nowhere")


def test_an_export_stops_where_its_origin_did(folders, tmp_path):
    """All ids in their order, and the tokenizer's own behind them."""
    config, params = pretrained.load(folders / "llama_tied")
    words = tokenizer_lib.train(["go north"], vocab_size=263, directory=tmp_path / "words")
    end = words.eos_token_id
    for given, tokenizer, expected in (
        ((80, 70, 60), None, [80, 70, 60]), ((9,), None, 9), ((), None, None),
        ((80, end, 60), words, [80, end, 60]), ((80, 70, 80), words, [80, 70, end]),
        ((), words, end), ((end,), words, end),
    ):
        pretrained.save(tmp_path / "model", config, params, tokenizer=tokenizer, stop_ids=given)
        for name in ("config.json", "generation_config.json"):
            settings = json.loads((tmp_path / "model" / name).read_text())
            assert settings.get("eos_token_id") == expected
        ids = expected if isinstance(expected, list) else [expected] if expected is not None else []
        assert pretrained.stop_ids(tmp_path / "model") == tuple(ids)
        theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
        assert theirs.eos_token_id == expected


def test_older_spelling_of_settings(folders, tmp_path):
    folder = copy_of(folders / "qwen2_tied", tmp_path)
    edit_config(folder, rope_parameters=..., rope_theta=5e4, rope_scaling=None, layer_types=...,
                dtype=..., torch_dtype="float32", use_mrope=False)
    assert pretrained.load(folder)[0] == pretrained.load(folders / "qwen2_tied")[0]


def test_names_say_nothing_of_the_numbers(folders, tmp_path):
    """As transformers writes them, the second for a model that came from a GGUF file."""
    folder = copy_of(folders / "llama_tied", tmp_path)
    edit_config(folder, _name_or_path="a/b", _model_name_or_path="Smollm2 135M")
    assert pretrained.load(folder)[0] == pretrained.load(folders / "llama_tied")[0]


@pytest.mark.parametrize("changes, named", [
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
     "rope_scaling.low_freq_factor is missing"),
    (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling.rope_type is 'dynamic'"),
    (dict(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
     "rope_parameters.rope_type is 'longrope'"),
    (dict(rope_scaling={"type": "linear", "factor": 0.5}), "rope factor must be at least 1"),
    (dict(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
     "rope_parameters.partial_rotary_factor"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(use_sliding_window=True), "use_sliding_window"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types has 2 entries"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(mlp_bias=True), "mlp_bias"),
    (dict(model_type="gemma"), "model_type is 'gemma'"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(residual_multiplier=0.2), "residual_multiplier is 0.2, a setting not known here"),
    (dict(hidden_size=...), "hidden_size is missing"),
])
def test_unsupported_setting_is_named(changes, named, folders, tmp_path):
    folder = copy_of(folders / "llama_tied", tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(pretrained.PretrainedError, match=named.replace("[", r"\[")) as caught:
        pretrained.load(folder)
    assert "\n" not in str(caught.value)


def test_all_wrong_tensors_are_listed_at_once(folders, tmp_path):
    folder = copy_of(folders / "llama_untied", tmp_path)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((2, 3), np.float32)
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((2, 3), np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(pretrained.PretrainedError) as caught:
        pretrained.load(folder)
    message = str(caught.value)
    assert "model.norm.weight is missing" in message
    assert "model.layers.1.mlp.up_proj.weight has shape (2, 3), expected (56, 32)" in message
    assert "model.layers.3.mlp.up_proj.weight is surplus" in message


def test_however_many_are_wrong_each_has_its_line(folders, tmp_path):
    folder = copy_of(folders / "llama_untied", tmp_path)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    norms = [name for name in tensors if "norm" in name]
    for name in norms:
        del tensors[name]
    surplus = [f"extra.{number}.weight" for number in range(40)]
    tensors |= {name: np.zeros(2, np.float32) for name in surplus}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(pretrained.PretrainedError) as caught:
        pretrained.load(folder)
    assert sorted(str(caught.value).splitlines()[1:]) == sorted(
        [f"  {name} is missing" for name in norms] + [f"  {name} is surplus" for name in surplus])

    config, params = pretrained.load(folders / "llama_untied")
    wrong = params | {f"head_{number}": jnp.ones(2) for number in range(20)}
    with pytest.raises(pretrained.PretrainedError) as caught:
        pretrained.save(tmp_path / "out", config, wrong)
    assert len(str(caught.value).splitlines()) == 21


def test_shards_that_are_not_what_the_index_says(folders, tmp_path):
    config, params = pretrained.load(folders / "llama_untied")
    pretrained.save(tmp_path / "model", config, params, max_shard_bytes=1)
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = list(content["weight_map"])
    files = list(content["weight_map"].values())
    content["weight_map"] = dict(zip(names, files[1:] + files[:1], strict=True))
    index.write_text(json.dumps(content))
    with pytest.raises(pretrained.PretrainedError, match="not what its index says") as caught:
        pretrained.load(tmp_path / "model")
    assert len(str(caught.value).splitlines()) == len(names) + 1


def test_redundant_tensors_are_accepted_only_when_they_are(folders, tmp_path):
    folder = copy_of(folders / "llama_tied", tmp_path)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    pretrained.load(folder)
    for row in (0, -1):
        changed = tensors["lm_head.weight"].copy()
        changed[row, 0] += 1
        safetensors.numpy.save_file(tensors | {"lm_head.weight": changed}, folder / "model.safetensors")
        with pytest.raises(pretrained.PretrainedError, match="lm_head.weight is surplus"):
            pretrained.load(folder)


def test_a_redundant_matrix_is_compared_in_stretches_of_rows(folders, tmp_path, monkeypatch):
    """97 rows of which the last stretch is shorter; whole, two of the largest tensors were held."""
    monkeypatch.setattr(pretrained, "_COMPARED_ROWS", 10)
    folder = copy_of(folders / "llama_tied", tmp_path)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    sizes, read = [], tensor_files.StoredTensor.read

    def recorded(*arguments):
        found = read(*arguments)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(tensor_files.StoredTensor, "read", recorded)
    for row, is_same in ((None, True), (95, False), (3, False)):
        head = embedding.copy()
        if row is not None:
            head[row, 0] += 1
        safetensors.numpy.save_file(
            tensors | {"lm_head.weight": head}, folder / "model.safetensors")
        stored = pretrained._locate_tensors(folder)
        sizes.clear()
        pair = (stored["lm_head.weight"], stored["model.embed_tokens.weight"])
        assert pretrained._holds_the_same(*pair) == is_same
        assert max(sizes) == 10 * embedding[0].nbytes
        # The first difference ends it.
        assert sum(sizes) == 2 * (10 * embedding[0].nbytes if row == 3 else embedding.nbytes)


def test_missing_and_damaged_files(folders, tmp_path):
    with pytest.raises(pretrained.PretrainedError, match="config.json does not exist"):
        pretrained.load(tmp_path / "nowhere")
    folder = copy_of(folders / "llama_tied", tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(pretrained.PretrainedError, match="model.safetensors cannot be read"):
        pretrained.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(pretrained.PretrainedError, match="holds neither"):
        pretrained.load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs_in_the_place_of_a_file(name, folders, tmp_path):
    folder = copy_of(folders / "llama_tied", tmp_path)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 17\n")
    with pytest.raises(pretrained.PretrainedError, match=f"{name} is a pointer of Git LFS.*`git lfs pull`"):
        pretrained.load(folder)


def test_save_refuses_other_trees_and_other_peoples_files(folders, tmp_path):
    config, params = pretrained.load(folders / "llama_tied")
    with pytest.raises(pretrained.PretrainedError, match="value_head/kernel is surplus"):
        pretrained.save(tmp_path / "x", config, params | {"value_head": {"kernel": jnp.ones(3)}})
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    for number in range(20):
        (tmp_path / "home" / f"zzz{number}").touch()
    with pytest.raises(pretrained.PretrainedError, match=r"\(thesis.tex, .* and 13 more\); saving"):
        pretrained.save(tmp_path / "home", config, params)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "precious"
    assert not (tmp_path / "x").exists()


def test_dtypes_that_weights_do_not_have_are_refused(folders, tmp_path):
    config, params = pretrained.load(folders / "llama_tied")
    for dtype in ("int8", "foo", "float64"):
        with pytest.raises(pretrained.PretrainedError, match=f"dtype is '{dtype}', expected one of float32, bfloat16, float16"):
            pretrained.load(folders / "llama_tied", dtype=dtype)
        with pytest.raises(pretrained.PretrainedError, match=f"dtype is '{dtype}'"):
            pretrained.save(tmp_path / "x", config, params, dtype=dtype)
    (tmp_path / "file").touch()
    with pytest.raises(pretrained.PretrainedError, match="file is a file"):
        pretrained.save(tmp_path / "file", config, params)
    assert not (tmp_path / "x").exists()


def test_a_folder_may_be_spelled_from_home(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config, params = pretrained.load(folders / "llama_tied")
    pretrained.save("~/model", config, params)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert pretrained.load("~/model")[0] == config


def test_save_replaces_an_earlier_export(folders, tmp_path):
    config, params = pretrained.load(folders / "llama_tied")
    pretrained.save(tmp_path / "model", config, params, max_shard_bytes=1)
    (tmp_path / "model" / "README.md").write_text("its card")
    pretrained.save(tmp_path / "model", config, params)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert (tmp_path / "model" / "README.md").read_text() == "its card"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_host_holds_one_tensor_at_a_time(tmp_path):
    """In and out; numpy reports what it allocates, and the parameters themselves are jax's."""
    config = decoder.DecoderConfig(
        vocab_size=8192, hidden_size=256, num_layers=20, num_heads=4, num_kv_heads=4, head_dim=64,
        intermediate_size=1024)
    shapes = jax.eval_shape(lambda key: decoder.init(config, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    largest = 8192 * 256 * 4
    margin = largest // 4
    assert 4 * decoder.num_params(params) > 8 * (largest + margin)

    def peak_of(action):
        action()   # compiles, which takes memory of its own
        tracemalloc.start()
        action()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])

    def save_from_devices():
        sharded = sharding.place(params, mesh)   # anew: an array may keep what was once fetched of it
        pretrained.save(tmp_path / "model", config, sharded)

    for dtype in (None, "bfloat16"):
        save = functools.partial(pretrained.save, tmp_path / "model", config, params, dtype=dtype)
        assert peak_of(save) < largest + margin, dtype
    assert peak_of(save_from_devices) < largest + margin
    for options in ({}, {"mesh": mesh}, {"dtype": "bfloat16"}):
        peak = peak_of(lambda: pretrained.load(tmp_path / "model", **options))
        assert peak < largest + margin, options


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2), (8, 1, 1), (1, 1, 8)], ids=str)
def test_parameters_on_a_mesh_are_saved_part_by_part(sizes, folders, tmp_path, monkeypatch):
    """A stretch of what is split would have all devices gather it, for each stretch."""
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    config, params = pretrained.load(folders / "qwen2_untied", mesh=mesh)
    devices, stretch = [], weights_out._stretch_on_device

    def recorded(part, *arguments, **options):
        devices.append(len(part.sharding.device_set))
        return stretch(part, *arguments, **options)

    monkeypatch.setattr(weights_out, "_stretch_on_device", recorded)
    monkeypatch.setattr(weights_out, "_STRETCH_BYTES", 300)
    with sharding.use(mesh):
        pretrained.save(tmp_path / "model", config, params)
    assert set(devices) == {1}
    wanted, found = (
        safetensors.numpy.load_file(folder / "model.safetensors") for folder in (folders / "qwen2_untied", tmp_path / "model")
    )
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(tensor, found[name])


def test_a_header_whose_sizes_do_not_fit_is_refused(folders, tmp_path):
    folder = copy_of(folders / "llama_tied", tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["dtype"] = "F64"
    text = json.dumps(header, separators=(",", ":")).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(pretrained.PretrainedError, match=r"model.norm.weight has 128 bytes for F64 \[32\]"):
        pretrained.load(folder)


def test_a_parameter_is_never_the_memory_that_tensors_are_read_into():
    tensor = jax.device_put(np.ones((8, 4), np.float32))
    leaf = pretrained._convert(tensor, dtype=jnp.dtype("float32"), transposed=False, where=None)
    assert leaf.unsafe_buffer_pointer() != tensor.unsafe_buffer_pointer()


def test_language_part_of_a_model_with_images(tmp_path):
    """Gemma 3 from 4B up is published so; the two spellings of its prefix."""
    their_models.make("gemma3").save_pretrained(tmp_path / "text")
    config, params = pretrained.load(tmp_path / "text")
    tensors = safetensors.numpy.load_file(tmp_path / "text" / "model.safetensors")
    settings = json.loads((tmp_path / "text" / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": settings, "vision_config": {}}
    for prefix, image in (("language_model.model.", ""), ("model.language_model.", "model.")):
        folder = tmp_path / prefix
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(whole))
        renamed = {prefix + name.removeprefix("model."): x for name, x in tensors.items()}
        renamed[f"{image}vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
        safetensors.numpy.save_file(renamed, folder / "model.safetensors")
        config_again, params_again = pretrained.load(folder)
        assert config_again == config
        jax.tree.map(np.testing.assert_array_equal, params, params_again)


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 2, 2), (2, 1, 2)])
def test_weights_go_straight_to_their_shards(shape, folders):
    """Read onto a mesh: the same values, split by the rules, and out again bit for bit."""
    devices = jax.devices()[:4]
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, shape, strict=True)), devices=devices)
    config, whole = pretrained.load(folders / "qwen2_untied")
    _, split = pretrained.load(folders / "qwen2_untied", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, whole, split)
    expected = sharding.shardings(whole, mesh)
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), split, expected)
    assert all(jax.tree.leaves(same))
    kernel = split["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size < kernel.size


def test_a_split_model_is_saved_whole(folders, tmp_path):
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    config, split = pretrained.load(folders / "qwen2_untied", mesh=mesh)
    pretrained.save(tmp_path / "model", config, split)
    theirs = safetensors.numpy.load_file(folders / "qwen2_untied" / "model.safetensors")
    ours = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_array_equal(theirs[name], ours[name])
