"""What a run stands on: the chat format that the config asks for, a tokenizer that fits the model, memory for
what it holds."""

import contextlib
import dataclasses
import pathlib
import re
import runpy
import types

import jax
import jax.numpy as jnp
import pytest
from records import make_task

from jaxagentrl import checkpoints, engine, plan, prepare, progress, states, tokenizer
from jaxagentrl.models import decoder, pretrained, rope, sharding


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    texts = ["open the box", "take the key"]
    return tokenizer.train(texts * 9, vocab_size=300, directory=tmp_path_factory.mktemp("tokens"))


def test_the_configs_system_message_and_template_variables_reach_the_prompt(trained, monkeypatch):
    opening = "{% if enable_thinking %}{{ 'Think. ' }}{% endif %}"
    monkeypatch.setattr(trained, "chat_template", opening + trained.chat_template)
    plain = prepare.make_chat(trained, {"system": None, "template_options": {}})
    told = prepare.make_chat(
        trained, {"system": "Be brief.", "template_options": {"enable_thinking": True}}
    )
    assert "Be brief." not in plain.decode(plain.first_prompt("Look."))
    opening = told.decode(told.first_prompt("Look."))
    assert opening.startswith("Think. ")
    assert opening.index("Be brief.") < opening.index("Look.")
    assert told.template_options["enable_thinking"] is True


def test_a_models_folder_gives_its_vocabulary_its_stop_ids_and_its_longest_text(
    trained, tmp_path, monkeypatch
):
    shape = dict(
        hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, intermediate_size=8
    )
    made = prepare.make_chat(trained, {"system": None, "template_options": {}})
    key, size, other = jax.random.key(0), len(trained), 7
    config = decoder.DecoderConfig(vocab_size=size, max_position_embeddings=64, **shape)
    folder = tmp_path / "model"
    pretrained.save(folder, config, decoder.init(config, key), tokenizer=trained, stop_ids=(other,))
    loaded = prepare._model({"directory": str(folder)}, made)
    assert loaded.vocab_size == size
    assert prepare.stop_ids(str(folder), made) == (made.end_of_turn_id, other)
    assert prepare.stop_ids(None, made) == (made.end_of_turn_id,)
    told = []
    monkeypatch.setattr(progress, "notice", told.append)
    prepare._note_long_texts(64, loaded)
    assert told == []
    prepare._note_long_texts(65, loaded)
    assert "sampling.max_length is 65" in told[0]

    small = decoder.DecoderConfig(vocab_size=size - 1, **shape)
    pretrained.save(tmp_path / "small", small, decoder.init(small, key))
    with pytest.raises(ValueError, match=f"knows the ids below {size - 1}"):
        prepare._model({"directory": str(tmp_path / "small")}, made)


SHAPE = dict(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48
)


def smoke_config(**changed):
    path = pathlib.Path(__file__).parents[1] / "configs" / "textworld_smoke.py"
    return runpy.run_path(str(path))["get_config"]().to_dict() | changed


class Reached(Exception):
    """The weights are about to be read."""


@pytest.mark.parametrize(
    "limit_gb, num_slots, words",
    [
        (1e-4, 16, "optimizer: .*optimizer.moment_dtype"),
        (0.1, 16_000, "cache: .*sampling.num_slots"),
        (0.1, 16, None),
    ],
)
def test_what_fits_no_device_is_refused_before_weights_are_read(
    trained, tmp_path, monkeypatch, limit_gb, num_slots, words
):
    folder, config = tmp_path / "model", smoke_config(memory_limit_gb=limit_gb)
    shape = decoder.DecoderConfig(vocab_size=len(trained), **SHAPE)
    pretrained.save(folder, shape, decoder.init(shape, jax.random.key(0)), tokenizer=trained)
    config["model"]["directory"] = str(folder)
    config["sampling"]["num_slots"] = num_slots

    def load(*_, **__):
        raise Reached

    monkeypatch.setattr(prepare, "games", lambda *_, **__: {"demo": []})
    monkeypatch.setattr(prepare, "_check_games", lambda *_: None)
    monkeypatch.setattr(prepare, "make_pool", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(prepare, "_tokenizer", lambda *_: trained)
    monkeypatch.setattr(pretrained, "load", load)
    workdir = types.SimpleNamespace(record=lambda *_: None, checkpoints=tmp_path / "checkpoints")
    with contextlib.ExitStack() as stack, pytest.raises(plan.PlanError if words else Reached) as told:
        stack.enter_context(prepare.everything(config, workdir))
    assert words is None or re.search(words, str(told.value))


@pytest.mark.parametrize("sizes", [None, (1, 2, 2)], ids=["one device", "mesh"])
@pytest.mark.parametrize("rank, base", [(0, "float32"), (2, "float32"), (2, "bfloat16")])
def test_what_a_run_holds_is_known_before_it_is_there(monkeypatch, sizes, rank, base):
    mesh = sizes and sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    model, config, looked_at = decoder.DecoderConfig(vocab_size=61, **SHAPE), smoke_config(), {}
    config["lora"]["rank"] = rank
    if base == "bfloat16":  # as a folder's model under adapters
        config["model"]["directory"], config["learner"]["compute_dtype"] = "a folder", base
    config["rl"]["critic"] = "head" if rank else "separate"
    config["rl"]["kl"]["placement"] = "loss"
    monkeypatch.setattr(plan.Plan, "check", lambda self: looked_at.update({self.stage: self}))
    prepare._check_memory(config, model, mesh, ("imitation", "RL", "evaluation"))
    imitation, rl, evaluation = looked_at.values()

    policy = jax.tree.map(lambda x: x.astype(base), decoder.init(model, jax.random.key(0)))
    trainable, frozen = sharding.place(prepare._with_lora(policy, config), mesh)
    setup = types.SimpleNamespace(model=model, mesh=mesh)
    for look, start in ((imitation, states.for_sft), (rl, states.for_rl)):
        with sharding.use(mesh):
            state = start(trainable, config, setup)
        assert look.always["parameters"] == plan.per_device((state.params, frozen))
        assert look.always["optimizer"] == plan.per_device(state.opt_state)
    assert imitation.always["reference"] == 0
    assert evaluation.always == imitation.always | {"optimizer": 0}
    assert rl.always["reference"] == plan.per_device(trainable)
    with sharding.use(None if mesh is None else sharding.decoding_mesh(mesh)):
        made = engine.Engine(model, stop_ids=(3,), **config["sampling"])
    assert rl.always["cache"] == plan.per_device(made._held)


@pytest.mark.parametrize("changes, words", [
    (dict(sliding_window=24, window_layers=(True, False)), "no published family has these model settings"),
    (dict(num_kv_heads=3), "model.num_heads .* must be a multiple of model.num_kv_heads"),
    (dict(rope_scaling={"factor": 2.0}), "model.rope_scaling.factor is 2.0, a setting not known"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "needs original_max_position_embeddings"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}), "give it as model.rope_theta"),
])
def test_a_model_that_could_not_be_written_is_refused_before_games_are_made(changes, words):
    config = smoke_config()
    prepare._check_model(config)
    config["model"] |= changes
    with pytest.raises(ValueError, match=words):
        prepare._check_model(config)


def test_rotations_are_scaled_as_a_published_file_says(trained):
    made = prepare.make_chat(trained, {"system": None, "template_options": {}})
    options = SHAPE | {"directory": None, "max_position_embeddings": 64}
    yarn = {"rope_type": "yarn", "factor": 4.0}
    model = prepare._model(options | {"rope_scaling": yarn}, made)
    assert model.rope_scaling == rope.Scaling("yarn", 4.0, original_max_position_embeddings=64)
    assert prepare._model(options | {"rope_scaling": {"rope_type": "default"}}, made).rope_scaling is None
    assert prepare._model(options | {"rope_scaling": None}, made).vocab_size == len(trained)


def test_a_folder_of_games_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    config = smoke_config()
    env = config["env"] | {"cache_dir": str(tmp_path / "file" / "games")}
    with pytest.raises(ValueError, match="env.cache_dir is .*/file/games', which cannot be made .Not a directory"):
        prepare.games(env, config["splits"], config["namings"])


def test_further_splits_are_trained_on_with_the_first_of_their_kind(smoke_games):
    env = smoke_config()["env"] | {"cache_dir": str(smoke_games)}
    splits = {
        "demo": (40001, 1), "demo_rooms": (60001, 1, {"world_size": 3}),
        "train": (50001, 2), "train_rooms": (60101, 1, {"world_size": 3}), "train_long": (60201, 1, {"quest_length": 5}),
        "test": (1, 1), "test_rooms": (1001, 1, {"world_size": 3}),
    }  # fmt: skip
    made = prepare.games(env, splits, {"demo": 1, "train": 2})
    assert {name: len(split) for name, split in made.items()} == {
        "demo": 1, "demo_rooms": 1, "train": 4, "train_rooms": 2, "train_long": 2, "test": 1, "test_rooms": 1
    }
    united = prepare.together(made)
    assert list(united) == ["demo", "train", "test", "test_rooms"]
    assert united["test"] == made["test"] and len(united["demo"]) == 2
    worlds = [(task.params["world_size"], task.params["quest_length"]) for task in united["train"]]
    assert worlds == [(2, 4)] * 4 + [(3, 4)] * 2 + [(2, 5)] * 2
    assert prepare._needed_splits(smoke_config() | {"splits": splits}, ("evaluation",)) == {
        "demo", "demo_rooms", "test", "test_rooms"  # a tokenizer is trained
    }


def test_games_that_are_not_there_are_found_out_before_anything_is_learned():
    there = {"demo": [1] * 15, "train": [1], "test": [1]}
    with pytest.raises(ValueError, match="no game in splits.train: of all of its seeds"):
        prepare._check_games({"num_steps": 0}, there | {"train": []})
    with pytest.raises(ValueError, match="sft.batch_size is 16, but of the games of splits.demo, with any demo_<name>, there are only 15"):
        prepare._check_games({"num_steps": 2, "batch_size": 16}, there)
    prepare._check_games({"num_steps": 2, "batch_size": 15}, there)
    prepare._check_games({"num_steps": 2, "batch_size": 16}, there | {"demo_rooms": [1]})
    with pytest.raises(ValueError, match="no game in splits.train_rooms: of all"):
        prepare._check_games({"num_steps": 0}, there | {"train_rooms": []})
    prepare._check_games({"num_steps": 0, "batch_size": 16}, {"test": [1]})


def test_a_run_prepares_for_the_stages_that_it_has_ahead(tmp_path):
    workdir = types.SimpleNamespace(checkpoints=tmp_path)
    ahead = {(2, 1): ("imitation", "RL"), (2, 0): ("imitation",), (0, 1): ("RL",), (0, 0): ("evaluation",)}

    def config(num_steps: int, num_iterations: int) -> dict:
        return {"sft": {"num_steps": num_steps}, "rl": {"num_iterations": num_iterations}}

    for given, stages in ahead.items():
        assert prepare.stages_ahead(config(*given), workdir) == stages
    over = {"step": 2, "is_over": True, "is_evaluated": True}
    checkpoints.save(tmp_path / "sft", step=2, state={"x": jax.numpy.zeros(1)}, host=over)
    assert prepare.stages_ahead(config(2, 1), workdir) == ("RL",)  # given iterations after its end
    assert prepare.stages_ahead(config(2, 0), workdir) == ("imitation",)
    checkpoints.save(tmp_path / "rl", step=0, state={"x": jax.numpy.zeros(1)}, host={"step": 0})
    for given in ahead:
        assert prepare.stages_ahead(config(*given), workdir) == ("RL",)


@pytest.mark.parametrize("rank, dtype", [(2, "bfloat16"), (0, "bfloat16"), (2, "float32")])
def test_a_frozen_base_lies_in_the_dtype_of_the_computation(trained, tmp_path, rank, dtype):
    """What is trained, adapters or the model, is float32; and so the plan counts them."""
    shape = dict(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
    config = decoder.DecoderConfig(
        vocab_size=len(trained), hidden_size=16, intermediate_size=24, **shape
    )
    key = jax.random.key(0)
    pretrained.save(tmp_path / "model", config, decoder.init(config, key), dtype="bfloat16")
    settings = {
        "seed": 0,
        "learner": {"compute_dtype": dtype},
        "lora": {"rank": rank, "alpha": 4.0, "targets": ("attention/(q|v)", "mlp/.*")},
        "model": {"directory": str(tmp_path / "model")},
    }
    policy = prepare._policy(settings, config, key, None)
    trainable, frozen = prepare._with_lora(policy, settings)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    size = decoder.num_params(policy)
    held = plan.per_device(trainable) + plan.per_device(frozen)
    if rank == 0:
        assert frozen is None and held == 4 * size
        return
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen["policy"])} == {jnp.dtype(dtype)}
    adapters = 4 * sum(leaf.size for leaf in jax.tree.leaves(trainable["adapters"]))
    assert held == jnp.dtype(dtype).itemsize * size + adapters + 4  # the scale


@pytest.mark.parametrize("section, named", [("tokenizer", "tokenizer folder"), ("model", "config.json")])
def test_a_wrong_folder_is_found_before_games_are_made(monkeypatch, tmp_path, section, named):
    config = smoke_config()
    config[section]["directory"] = str(tmp_path / "nothing")
    monkeypatch.setattr(prepare, "games", lambda *_: pytest.fail("games were made"))
    with contextlib.ExitStack() as stack, pytest.raises(ValueError, match=f"{named}.*not exist"):
        stack.enter_context(prepare.everything(config, workdir=None))


def test_tasks_that_cannot_be_scored_or_are_of_another_environment_are_refused():
    good = make_task()
    prepare._check_tasks("textworld", {"test": [good, dataclasses.replace(good, env="")]})
    with pytest.raises(ValueError, match="game-s1 of splits.train has no max_score above 0"):
        prepare._check_tasks("textworld", {"train": [dataclasses.replace(good, max_score=0.0)]})
    with pytest.raises(ValueError, match="env.name is 'a:B', but splits.test has tasks of textworld"):
        prepare._check_tasks("a:B", {"test": [good]})
