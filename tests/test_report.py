"""The report of a made-up run whose numbers are known."""

import html.parser
import io
import json
import math
import pathlib
import re
import runpy

import numpy as np
import pytest
import rich.console
import yaml

from envs_host.types import StopReason, Task
from jaxagentrl import metrics, report, report_card, report_curves, report_data, report_page, tokenizer
from jaxagentrl.trajectory import Trajectory, Turn

ROOT = pathlib.Path(__file__).resolve().parent.parent
TASK_NAMES = ("custom-s1", "custom-s2", "custom-s3")


def evaluation(successes, n):
    return metrics.success_metrics("eval", successes, n) | {
        "eval/return_mean": successes / n + 0.1, "eval/turns_mean": 6.5, "eval/tokens_mean": 140.0,
        "eval/invalid_command_rate": 0.05, "eval/env_failures": 1,
        "eval/stop_done": successes, "eval/stop_turn_limit": n - successes,
    }


def trajectory(task_name, vocabulary, won):
    task = Task(env="textworld", name=task_name, params={}, seed=1, file="x.z8", digest="0" * 64,
                objective="Open the <box> & win.", max_score=1.0, walkthrough=("open box", "win"))
    ids = np.asarray(vocabulary("open box").input_ids + [vocabulary.eos_token_id], np.int32)
    turn = Turn(
        prompt_ids=np.arange(5, dtype=np.int32), action_ids=ids,
        logprobs=np.linspace(-0.01, -5.0, len(ids), dtype=np.float32),
        entropies=np.full(len(ids), 0.5, np.float32), observation="A <script>room</script>.",
        action="open box", command="open box", reward=float(won), intermediate_reward=1.0,
        valid_command=won, score=float(won))
    return Trajectory(task=task, group=0, member=0, turns=[turn, turn], won=won, score=float(won),
                      stop_reason=StopReason.DONE if won else StopReason.TURN_LIMIT, max_score=1.0)


def make_run(root, *, stages=("baseline", "sft", "rl")):
    """A workdir as train.py leaves it: 200 held-out tasks, 3 % → 42 % → 63 %."""
    rng = np.random.default_rng(0)
    with metrics.Writer(root) as writer:
        if "baseline" in stages:
            writer.write("baseline", 0, metrics.success_metrics("random", 6, 200)
                         | metrics.success_metrics("walkthrough", 200, 200)
                         | evaluation(0, 200) | {"time/prepare_s": 240.0})
        if "sft" in stages:
            for step in range(20, 601, 20):
                writer.write("sft", step, {
                    "loss/action": 4 * math.exp(-step / 150) + 0.1 * rng.random(),
                    "loss/observation": 3 * math.exp(-step / 200), "time/sft_s": 12.0})
            writer.write("eval", 0, evaluation(84, 200))
        if "rl" in stages:
            for step in range(1, 81):
                values = {"rollout/return_mean": 0.5 + step / 300 + 0.08 * rng.normal(),
                          "rollout/success_rate": 0.42 + step / 350 + 0.08 * rng.normal(),
                          "time/rollout_s": 3.0, "time/update_s": 2.0, "time/evaluate_s": 0.0}
                if step % 10 == 0:
                    values |= evaluation(84 + step * 42 // 80, 200) | {"time/evaluate_s": 8.0}
                writer.write("rl", step, values)
    # The clock of a run made in a millisecond is put where those durations say.
    lines, now = metrics.read(root / "metrics.jsonl"), 0.0
    for line in lines:
        now += sum(value for key, value in line.items()
                   if key in ("time/sft_s", "time/rollout_s", "time/update_s", "time/evaluate_s"))
        line["time/run_s"] = now
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "config.json").write_text(json.dumps(
        {"config": {"note": "<b>bold</b>"}, "versions": {"jax": "0.10"}, "facts": {}}))
    vocabulary = tokenizer.train(
        ["open box", "go north"] * 5, vocab_size=280, directory=root / "tokenizer")
    (root / "trajectories").mkdir()
    for stage, wins in (("sft", (False, True, False)), ("rl", (True, True, False))):
        if stage in stages:
            (root / "trajectories" / f"eval_{stage}.jsonl").write_text("".join(
                json.dumps(trajectory(name, vocabulary, won).to_json()) + "\n"
                for name, won in zip(TASK_NAMES, wins, strict=True)))


@pytest.fixture
def root(tmp_path):
    make_run(tmp_path)
    return tmp_path


def table_text(root):
    output = io.StringIO()
    report.print_table(
        report_data.read(root), console=rich.console.Console(file=output, width=100))
    return output.getvalue()


def test_run_is_read(root):
    run = report_data.read(root)
    assert [e.name for e in run.milestones] == [
        "random agent", "walkthrough agent", "untrained model", "after imitation",
        "after RL (80 iterations)"]
    assert [e.success for e in run.milestones] == [0.03, 1.0, 0.0, 0.42, 0.63]
    assert len(run.evaluations) == 2 + 8
    final = run.last("rl")
    assert (final.low, final.high) == metrics.wilson_interval(126, 200)
    # 240 s of preparation, 30 × 12 s of imitation, 80 × 5 s of RL, 8 × 8 s of evaluation.
    assert final.seconds == pytest.approx(240 + 360 + 400 + 64)
    assert run.time_split == pytest.approx({
        "preparation": 240, "imitation": 360, "sampling": 240, "updates": 160, "evaluation": 64,
        "other": 0})


def test_verdict_says_whether_intervals_overlap(root):
    verdict = report_data.verdict(report_data.read(root))
    assert verdict == ("RL added 21.0 points of held-out success over imitation (42.0 % to 63.0 %);"
                       " the 95 % intervals do not overlap.")
    lines = metrics.read(root / "metrics.jsonl")
    lines[-1].update(metrics.success_metrics("eval", 90, 200))
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "overlap: this may be chance" in report_data.verdict(report_data.read(root))


def test_no_verdict_where_nothing_was_played(root):
    lines = metrics.read(root / "metrics.jsonl")
    lines[-1].update({"eval/success_rate": "nan"} | metrics.success_metrics("eval", 0, 0))
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report_data.verdict(report_data.read(root)) is None


def test_a_run_without_imitation_says_nothing_of_it(tmp_path):
    """RL on a model that was there, or nothing but its evaluation."""
    root = tmp_path
    make_run(root, stages=("baseline", "rl"))
    content = {"config": {"sft": {"num_steps": 0}, "model": {"directory": "models/a"}}}
    (root / "config.json").write_text(json.dumps(content))
    run = report_data.read(root)
    assert [e.name for e in run.milestones[2:]] == ["model as loaded", "after RL (80 iterations)"]
    assert report_data.verdict(run).startswith(
        "RL added 63.0 points of held-out success over the model as loaded (0.0 % to 63.0 %)")
    assert "after imitation" not in table_text(root)
    content["config"]["model"]["directory"] = None
    (root / "config.json").write_text(json.dumps(content))
    assert report_data.read(root).milestones[2].name == "untrained model"


def test_what_cannot_be_written_is_no_end_of_the_report(root):
    path = root / "trajectories" / "eval_rl.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["turns"][0]["observation"] = "half of a pair: \ud83d"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.write(root, console=rich.console.Console(file=io.StringIO()))
    assert "half of a pair: ?" in (root / "report.html").read_text(encoding="utf-8")


def test_other_temperatures_stand_beside_the_verdict(tmp_path):
    make_run(tmp_path)
    assert report_data.verdict_at_other_temperatures(report_data.read(tmp_path)) is None
    lines = metrics.read(tmp_path / "metrics.jsonl")
    for line, successes in ((lines[31], (84, 40)), (lines[-1], (120, 110))):
        assert "eval/episodes" in line
        for suffix, won in zip((".t0", ".t0.7"), successes, strict=True):
            line.update(metrics.success_metrics("eval" + suffix, won, 200))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = report_data.read(tmp_path)
    assert report_data.verdict_at_other_temperatures(run) == (
        "With other sampling: greedy from 42.0 % [35.4, 48.9] to 60.0 % [53.1, 66.5]; "
        "temperature 0.7 from 20.0 % [15.0, 26.1] to 55.0 % [48.1, 61.7].")
    assert [e.name for e in run.other_temperatures[0.7]] == [
        "after imitation, temperature 0.7", "after RL (80 iterations), temperature 0.7"]
    assert run.last("rl").success == 0.63   # the run's own temperature's, as before
    told = " ".join(table_text(tmp_path).split())
    assert "temperature 0.7 from 20.0 % [15.0, 26.1] to 55.0 %" in told
    assert "after imitation, greedy" in report_page.page(run, b"")


def test_several_attempts_stand_beside_the_verdict(tmp_path):
    make_run(tmp_path)
    assert report_data.verdict_on_attempts(report_data.read(tmp_path)) is None
    lines = metrics.read(tmp_path / "metrics.jsonl")
    for line, shares in ((lines[31], (0.4, 0.5)), (lines[-1], (0.6, 0.625))):
        line.update(metrics.success_metrics("eval.t1", 100, 200))
        for k, share in zip((1, 2, 8), (shares[0], 0.99, shares[1]), strict=True):
            line |= {f"eval.t1/pass_at_{k}{end}": share + by for end, by in (("", 0.0), ("_low", -0.1), ("_high", 0.2))}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sentence = (
        "With several attempts at a game: pass@1 at temperature 1 from 40.0 % [30.0, 60.0] to 60.0 % [50.0, 80.0]; "
        "pass@8 at temperature 1 from 50.0 % [40.0, 70.0] to 62.5 % [52.5, 82.5]."
    )
    run = report_data.read(tmp_path)
    assert report_data.verdicts(run)[-1] == sentence
    assert sentence in " ".join(table_text(tmp_path).split()) and sentence in report_page.page(run, b"")


def test_table_in_the_terminal(root):
    text = table_text(root)
    row = next(line for line in text.splitlines() if line.strip().startswith("after RL"))
    assert row.split() == ["after", "RL", "(80", "iterations)", "126/200", "63.0", "%", "[56.1,",
                           "69.4]", "0.73", "6.5", "5", "%"]
    assert "RL added 21.0 points" in text
    assert "Time: 18 min (preparation 4 min, imitation 6 min, sampling 4 min, updates 3 min" in text


@pytest.mark.parametrize("stages", [(), ("baseline",), ("baseline", "sft"), ("rl",)])
def test_a_run_without_some_stages(stages, tmp_path):
    make_run(tmp_path, stages=stages)
    report.write(tmp_path, console=rich.console.Console(file=io.StringIO(), width=100))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert report_data.verdict(report_data.read(tmp_path)) is None


def test_non_finite_metrics_do_not_stop_the_report(root):
    with open(root / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"phase": "rl", "step": 81, "rollout/return_mean": "nan",
                               "rollout/success_rate": 0.5, "time/run_s": 900.0}) + "\n")
    report_curves.draw(report_data.read(root))


class Tags(html.parser.HTMLParser):
    VOID = {"meta", "img", "link", "br"}

    def __init__(self):
        super().__init__()
        self.stack, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_page_is_well_formed_and_escapes_what_it_shows(root):
    report.write(root, console=rich.console.Console(file=io.StringIO()))
    text = (root / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.stack == []
    assert "script" not in tags.seen and "b" in tags.seen   # our own <b>, none from the game
    assert "&lt;script&gt;room" in text and "&lt;b&gt;bold" in text
    assert "http://" not in text and "https://" not in text   # opens without a network
    assert "126 / 200" in text and "63.0 % [56.1, 69.4]" in text


def test_page_colors_tokens_by_their_probability(root):
    run = report_data.read(root)
    vocabulary = tokenizer.load(root / "tokenizer")
    record = trajectory("custom-s1", vocabulary, True)
    text = report_page.page(run, b"png")
    turn = record.turns[0]
    spans = re.findall(r'title="p = ([0-9.]+), [^>]*rgba\(213,94,0,([0-9.]+)\)">([^<]*)<', text)
    first = spans[:len(turn.action_ids)]
    assert [float(p) for p, _, _ in first] == [
        pytest.approx(math.exp(x), abs=5e-4) for x in turn.logprobs]
    assert first[0][1] == "0.00" and first[-1][1] == "1.00"
    assert "".join(piece for _, _, piece in first) == "open box&lt;|im_end|&gt;"
    # The same task at both stages, won and not won both present.
    assert text.count("<summary>after RL:") == 3 and text.count("<summary>after imitation:") == 3


def test_episodes_are_shown_without_a_tokenizer(root):
    for file in (root / "tokenizer").iterdir():
        file.unlink()
    assert ">open box</span>" in report_page.page(report_data.read(root), b"png")


def carded(root, **changes) -> dict[str, str]:
    """The cards of a run of the quick start's config, by folder; `changes` are of keys."""
    config = runpy.run_path(str(ROOT / "configs" / "textworld_quickstart.py"))["get_config"]()
    config.update_from_flattened_dict(changes)
    content = {
        "config": json.loads(json.dumps(config.to_dict())),
        "versions": {"jax": "0.10", "textworld": "1.7.0"},
        "facts": {"games": {"demo": "d" * 64, "train": "7" * 64, "test": "e" * 64}},
    }
    (root / "config.json").write_text(json.dumps(content))
    report.write(root, console=rich.console.Console(file=io.StringIO()))
    return {path.parent.name: path.read_text(encoding="utf-8") for path in root.glob("*/README.md")}


def test_a_model_has_a_card_with_what_it_wins_and_came_from(root):
    (root / "model").mkdir()
    (text,) = carded(root, **{"env.cache_dir": "/home/me/games"}).values()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["jaxagentrl", "reinforcement-learning", "custom"],
    }
    assert "# An agent for custom (nb_objects 3, quest_length 4, theme basic, world_size 2)" in text
    assert "trained from scratch" in text and "600 steps of imitating 16 demonstrations and 80 iterations of RL (32 games × 8" in text
    assert "| after RL (80 iterations) | 126/200 | 63.0 % [56.1, 69.4] | 5 % |" in text
    assert "RL added 21.0 points" in text
    assert f"| test | 1 to 300 | `{'e' * 64}` |" in text
    assert "jax 0.10, textworld 1.7.0." in text
    settings = json.loads(text.split("```json\n")[1].split("```")[0])
    assert settings["rl"]["advantage"]["name"] == "gigpo" and settings["splits"]["test"] == [1, 300]
    assert "/home/me" not in text and "cache_dir" not in text


def test_a_card_tells_what_a_fork_changed_but_no_places():
    forked = [
        {"after": "RL iteration 8", "changed": ["env.cache_dir: \"/a\" → \"/b\"", "rl.num_iterations: 8 → 12"]},
        {"after": "RL iteration 9", "changed": ["env.cache_dir: \"/b\" → \"/c\""]},
        {"after": "RL iteration 10", "changed": []},
    ]
    assert report_card._past({"forked": forked}) == " After RL iteration 8 was changed: rl.num_iterations: 8 → 12."
    assert report_card._past({}) == ""


def test_a_card_that_somebody_wrote_stays(root):
    (root / "model").mkdir()
    (first,) = carded(root).values()
    (again,) = carded(root, seed=3).values()
    assert "seed 0." in first and "seed 3." in again
    (root / "model" / "README.md").write_text("mine")
    assert carded(root) == {"model": "mine"}


def test_adapters_have_a_card_that_names_their_model_without_its_place(root):
    (root / "adapters").mkdir()
    cards = carded(root, **{"model.directory": "/home/me/models/Qwen2.5-0.5B", "lora.rank": 4})
    assert list(cards) == ["adapters"] and "library_name: peft" in cards["adapters"]
    assert "Adapters for `Qwen2.5-0.5B`." in cards["adapters"] and "/home/me" not in cards["adapters"]
    assert "PeftModel.from_pretrained" in cards["adapters"]


def test_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="no metrics.jsonl"):
        report.write(tmp_path)


def test_further_splits_stand_in_the_table_and_on_the_page(tmp_path):
    make_run(tmp_path)
    lines = metrics.read(tmp_path / "metrics.jsonl")
    for line, won in ((lines[31], 84), (lines[-1], 120)):
        assert "eval/episodes" in line
        line.update(metrics.success_metrics("eval_seen", won, 150))
        line.update(metrics.success_metrics("eval_seen.t0", won, 150))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = report_data.read(tmp_path)
    assert [e.name for e in run.other_splits["seen"]] == ["after imitation, test_seen", "after RL (80 iterations), test_seen"]
    assert list(run.other_splits) == ["seen"] and run.last("rl").success == 0.63
    told = table_text(tmp_path)
    assert "test_seen" in told and "120/150" in told and "84/150" not in told
    assert "after imitation, test_seen" in report_page.page(run, b"")
