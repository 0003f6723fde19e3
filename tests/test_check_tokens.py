"""The certificate: it passes what is right, and each of its checks fails when that breaks."""

import dataclasses
import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import tokenizers

pytest.importorskip("torch")

import their_models  # noqa: E402  (after the check that torch is there)
import their_tokenizers  # noqa: E402

from jaxagentrl import batching, chat, engine, learner, tokenizer  # noqa: E402
from jaxagentrl.models import attention  # noqa: E402

_FILE = pathlib.Path(__file__).resolve().parent.parent / "tools" / "check_tokens.py"
_SPEC = importlib.util.spec_from_file_location("check_tokens", _FILE)
check_tokens = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check_tokens)

SMALL = ["--conversations=2", "--turns=2", "--turn_tokens=6"]


def make_folder(directory, name):
    """A model as transformers writes it, tokenizer beside weights."""
    their_tokenizers.make(name, directory)
    size = len(tokenizer.load(directory))
    their_models.make(name, vocab_size=size).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("qwen3"), "qwen3")


def test_soft_caps_act_in_both_passes_and_a_surplus_special_token_is_no_fault(tmp_path, capsys):
    """Gemma 2 caps its logits, in the sampler's program and in that of training. In Gemma 3 of 1B the
    last special token, for images, has no embedding."""
    their_tokenizers.make("gemma2", tmp_path)
    words = tokenizer.load(tmp_path)
    size = len(words)
    words.add_tokens(tokenizers.AddedToken("<image_soft_token>", special=True))
    words.save_pretrained(tmp_path)
    assert len(tokenizer.load(tmp_path)) == size + 1
    their_models.make("gemma2", vocab_size=size).save_pretrained(tmp_path)
    assert check_tokens.main([str(tmp_path), *SMALL]) == 0
    assert "chat family gemma" in capsys.readouterr().out

    # Now the last of the ordinary ones too.
    their_models.make("gemma2", vocab_size=size - 1).save_pretrained(tmp_path)
    assert check_tokens.main([str(tmp_path), *SMALL]) == 1
    assert f"FAIL vocabulary: the model knows the ids below {size - 1}" in capsys.readouterr().out


def test_a_good_model_passes(folder, capsys):
    assert check_tokens.main([str(folder), *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("chat family chatml, end of turn '<|im_end|>'")
    assert lines[1] == "note: the template drops the thinking of earlier turns; here it stays"
    assert [line.split(":")[0] for line in lines[2:]] == [
        "ok   vocabulary", "ok   first prompt", "ok   template", "ok   append-only", "ok   masks", "ok   log-probs, in rows",
        "ok   log-probs, packed"]
    assert "worst token" in lines[-1] and "sampler -" in lines[-1]


def test_the_programs_are_those_of_a_run(folder, monkeypatch):
    """float32 weights, and both passes in the dtype that is asked for, the sampler's from its copy."""
    asked, sampled_with = [], []
    make_score, launch = learner.make_score, engine.Engine.launch

    def recorded(config, **options):
        score = make_score(config, **options)

        def scored(params, *rest):
            asked.append((options["compute_dtype"], dtypes(params)))
            return score(params, *rest)

        return scored

    def dtypes(params):
        return {str(leaf.dtype) for leaf in jax.tree.leaves(params)}

    def launched(self, params, *rest, **options):
        sampled_with.append(dtypes(params))
        return launch(self, params, *rest, **options)

    monkeypatch.setattr(learner, "make_score", recorded)
    monkeypatch.setattr(engine.Engine, "launch", launched)
    assert check_tokens.main([str(folder), *SMALL, "--dtype=bfloat16"]) == 0
    assert asked == [("bfloat16", {"float32"})] * 2   # in rows and packed
    assert sampled_with and all(found == {"bfloat16"} for found in sampled_with)


def test_a_scoring_path_that_differs_from_decoding_is_caught(folder, capsys, monkeypatch):
    right = attention.attend

    def wrong(q, k, v, mask, *, scale, **rest):
        return right(q, k, v, mask, scale=1.1 * scale, **rest)

    monkeypatch.setattr(attention, "attend", wrong)
    assert check_tokens.main([str(folder), *SMALL]) == 1
    assert "FAIL log-probs, in rows: largest gap" in capsys.readouterr().out


def test_prompts_that_are_not_the_templates_are_caught(folder):
    made = chat.make(tokenizer.load(folder))
    assert check_tokens.check_first_prompts(made, None).passed
    finding = check_tokens.check_first_prompts(
        dataclasses.replace(made, header=made.header.rstrip("\n")), None)
    assert not finding.passed and "0 of 6" in finding.text


def test_masks_and_appends_that_are_off_are_caught(folder):
    from records import make_trajectory, make_turn

    made = chat.make(tokenizer.load(folder))
    action = made.encode_action("open box")
    first, later = made.first_prompt("Hello."), made.next_prompt("It is open.", ended=True)
    talks = [make_trajectory([make_turn(first, action), make_turn(later, action)])]
    batch = batching.to_batch(talks, None, discount=1.0, length_buckets=[128], row_multiple=1)
    assert check_tokens.check_masks(made, talks, batch).passed
    told = [["Hello.", "It is open."]]
    assert check_tokens.check_append_only(made, talks, told).passed
    shifted = dataclasses.replace(batch, action_mask=np.roll(batch.action_mask, 1, axis=1))
    finding = check_tokens.check_masks(made, talks, shifted)
    assert not finding.passed and "other tokens than were sampled" in finding.text
    for turns, problem in (
        ([(first, action), (later[2:], action)], "turn 2: the glue"),
        ([(first, action), (later, action), (later, action)], "3 turns for 2 texts"),
        # The history is in the prompt again, as where each prompt is rendered anew.
        ([(first, action), (np.concatenate([later, action, later]), action)], "is left after the last answer"),
        ([(first, action), (made.next_prompt("Hello.", ended=True), action)], "turn 2: the user text"),
        ([(first, action[:-1]), (later, action)], "turn 2: the glue"),
    ):
        talks = [make_trajectory([make_turn(*turn) for turn in turns])]
        finding = check_tokens.check_append_only(made, talks, told)
        assert not finding.passed and problem in finding.text


@pytest.mark.parametrize("name", their_tokenizers.FAMILIES)
def test_conversations_of_every_family_pass(name, tmp_path):
    """Whatever is sampled, cut characters and special tokens in the middle of an answer among it."""
    from records import make_trajectory, make_turn

    loaded = tokenizer.load(their_tokenizers.make(name, tmp_path))
    made = chat.make(loaded)
    assert check_tokens.check_template(made, None).passed
    random = np.random.default_rng(0)
    talks, told = [], []
    for number in range(6):
        texts, turns = check_tokens.texts_told(number, 6), []
        for text in texts:
            ended = not turns or turns[-1].action_ids[-1] == made.end_of_turn_id
            prompt = made.next_prompt(text, ended=ended) if turns else made.first_prompt(text)
            said = random.integers(len(loaded), size=8)
            said = said[said != made.end_of_turn_id]
            said = [*said, made.end_of_turn_id][: len(said) + number % 2]
            turns.append(dataclasses.replace(make_turn(prompt, said), action=made.decode_action(said)))
        talks.append(make_trajectory(turns))
        told.append(texts)
    assert check_tokens.check_append_only(made, talks, told).passed


def test_a_template_that_changes_its_glue_is_caught(folder):
    made = chat.make(tokenizer.load(folder))
    finding = check_tokens.check_template(dataclasses.replace(made, between="\n\n" + made.between), None)
    assert not finding.passed and "0 of 4" in finding.text


def test_the_prompts_are_the_runs_own(folder, capsys):
    options = ["--system=Play well.", '--template_options={"enable_thinking": false}']
    seen = []
    make = chat.make

    def recorded(*args, **options):
        seen.append(make(*args, **options))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "make", recorded)
        assert check_tokens.main([str(folder), *SMALL, *options]) == 0
    assert all(made.header.endswith("<think>\n\n</think>\n\n") for made in seen)
    assert all("Play well." in made.before_first for made in seen)
    out = capsys.readouterr().out
    assert "opens an answer with '<think>" in out and "ok   first prompt" in out
    assert "ok   template" not in out   # earlier turns lose the empty thought
    for wrong, said in (("[1]", "no JSON object"), ("{enable", "is not JSON")):
        with pytest.raises(SystemExit):
            check_tokens.main([str(folder), f"--template_options={wrong}"])
        assert said in capsys.readouterr().err
    assert check_tokens.main([str(folder), '--template_options={"enable_thinkng": false}']) == 2
    assert "Did you mean enable_thinking?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [("--fsdp=2", "--tensor=2"), ("--data=4",)], ids=" ".join)
def test_a_model_on_a_mesh_passes(folder, capsys, monkeypatch, mesh):
    lying_on = []
    make_score = learner.make_score

    def recorded(config, **options):
        score = make_score(config, **options)

        def scored(params, *rest):
            lying_on.append({len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)})
            return score(params, *rest)

        return scored

    monkeypatch.setattr(learner, "make_score", recorded)
    assert check_tokens.main([str(folder), *SMALL, *mesh]) == 0
    assert lying_on == [{4}, {4}]
    assert "ok   log-probs, packed" in capsys.readouterr().out


def test_bfloat16_is_judged_by_its_mean(folder, capsys):
    assert check_tokens.main([str(folder), *SMALL, "--dtype=bfloat16", "--tolerance=1e-9"]) == 1
    assert "(limit of the mean 1e-09)" in capsys.readouterr().out
    assert check_tokens.main([str(folder), *SMALL, "--dtype=bfloat16"]) == 0
    said = capsys.readouterr().out
    largest = float(said.split("largest gap ")[1].split(",")[0])
    mean = float(said.split("mean ")[1].split(" ")[0])
    assert mean < largest
    between = (mean + largest) / 2
    assert check_tokens.main([str(folder), *SMALL, "--dtype=bfloat16", f"--tolerance={between}"]) == 0
    assert check_tokens.main([str(folder), *SMALL, "--tolerance=1e-9"]) == 1
    assert "(limit of the largest 1e-09)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_a_coarse_cache_is_judged_by_its_mean(folder, capsys, cache_dtype):
    options = [str(folder), *SMALL, f"--cache_dtype={cache_dtype}"]
    assert check_tokens.main(options) == 0
    assert "(limit of the mean 0.1)" in capsys.readouterr().out
    assert check_tokens.main([*options, "--tolerance=1e-9"]) == 1
    assert f"it is the rounding of a cache in {cache_dtype}" in capsys.readouterr().out


def test_a_folder_that_is_no_models_is_named_without_a_traceback(tmp_path, capsys):
    assert check_tokens.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and str(tmp_path) in said


def test_an_unknown_cache_dtype_is_refused_before_anything_is_read(capsys):
    with pytest.raises(SystemExit):
        check_tokens.main(["nowhere", "--cache_dtype=int4"])
    assert "int4" in capsys.readouterr().err
