"""report.html: one file without scripts or outside links, for reading a run and a few episodes."""

import base64
import html
import json
import math
import pathlib
from collections.abc import Collection, Iterable, Sequence

from jaxagentrl import report_data
from jaxagentrl import tokenizer as tokenizer_lib
from jaxagentrl.report_data import Run
from jaxagentrl.trajectory import Trajectory, Turn

_NUM_TASKS = 4   # episodes shown: this many tasks, each as played at every stage that kept it
_FAINT_LOGPROB = math.log(0.02)   # a token this unlikely has the full color

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: .6rem 0 }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
details { border: 1px solid #ddd; border-radius: 6px; padding: .4rem .8rem; margin: .5rem 0 }
summary { cursor: pointer }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; font-size: 13px }
.observation { color: #555; border-left: 3px solid #ddd; padding-left: .7rem }
.action { font: 14px ui-monospace, monospace; margin: .2rem 0 .8rem .9rem }
.action span { border-radius: 3px; padding: 1px 0; white-space: pre-wrap }
.reward { color: #666; font-size: 13px; margin-left: .8rem }
.won { color: #00704f } .lost { color: #a8470d }
"""


def page(run: Run, curves_png: bytes) -> str:
    """The whole page as text. Everything that came from a game or a model is escaped."""
    name = run.root.resolve().name
    image = base64.b64encode(curves_png).decode("ascii")
    parts = [
        "<!doctype html>\n<html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(name)}: jaxagentrl run</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(name)}</h1>",
        *(f"<p>{html.escape(verdict)}</p>" for verdict in report_data.verdicts(run)),
        f'<img alt="success, imitation loss and RL return" src="data:image/png;base64,{image}">',
        "<h2>Held-out evaluation</h2>", _evaluation_table(run),
        "<h2>How episodes ended</h2>", _stop_table(run),
        "<h2>Where the time went</h2>", _time_table(run),
        "<h2>Episodes on held-out tasks</h2>", _episodes(run),
        "<h2>Configuration</h2>", _configuration(run),
        "</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _evaluation_table(run: Run) -> str:
    rows = []
    further = (*run.other_temperatures.values(), *run.other_splits.values())
    others = [e for evaluations in further for e in evaluations]
    for evaluation in [*run.agents.values(), *run.evaluations, *others]:
        values = evaluation.values
        rows.append((
            evaluation.name, f"{values['successes']:.0f} / {evaluation.episodes}",
            report_data.percent(evaluation), _number(values, "return_mean", 3),
            _number(values, "turns_mean", 1), _number(values, "tokens_mean", 0),
            _share(values, "invalid_command_rate"),
        ))
    heads = ("agent", "won", "success [95 % interval]", "mean return", "turns", "tokens",
             "refused commands")
    return _table(heads, rows)


def _stop_table(run: Run) -> str:
    model = [e for e in run.milestones if e.stage in ("untrained", "sft", "rl")]
    reasons = [
        key for key in dict.fromkeys(key for e in model for key in e.values)
        if key.startswith("stop_") and any(e.values.get(key) for e in model)
    ]
    heads = ("", *(reason.removeprefix("stop_").replace("_", " ") for reason in reasons),
             "environment failures (not counted)")
    rows = [
        (e.name, *(_number(e.values, reason, 0) for reason in reasons),
         _number(e.values, "env_failures", 0))
        for e in model
    ]
    return _table(heads, rows)


def _time_table(run: Run) -> str:
    split = run.time_split
    total = sum(split.values())
    rows = [
        (label, report_data.duration(seconds), f"{100 * seconds / total:.0f} %")
        for label, seconds in split.items() if total and seconds >= 0.5
    ]
    return _table(("", "time", "share"), [*rows, ("total", report_data.duration(total), "")])


def _episodes(run: Run) -> str:
    """The same few tasks as played at each stage, newest stage first."""
    played = {
        stage: run.root / "trajectories" / f"eval_{stage}.jsonl"
        for stage in ("rl", "sft", "untrained")
    }
    played = {stage: path for stage, path in played.items() if path.exists()}
    if not played:
        return "<p>This run has kept no episodes.</p>"
    pieces = _token_texts(run)
    newest = next(iter(played))
    chosen = _choose(_read_trajectories(played[newest]))
    parts = [
        "<p>Tokens the model chose are colored by how unlikely they were under the distribution "
        "they were sampled from: no color is near certain, full color is 2 % or less; hover for "
        "the number.</p>"
    ]
    titles = run.stage_names
    names = {trajectory.task.name for trajectory in chosen}
    others = {
        stage: {t.task.name: t for t in _read_trajectories(path, names)}
        for stage, path in played.items() if stage != newest
    }
    for number, trajectory in enumerate(chosen):
        task = trajectory.task
        parts.append(f"<h3>{html.escape(task.name)}</h3>")
        if task.objective:
            parts.append(f"<p>{html.escape(task.objective)}</p>")
        parts.append(f"<p>One way to win: {html.escape(' > '.join(task.walkthrough))}</p>")
        parts.append(_episode(trajectory, titles[newest], pieces, is_open=number == 0))
        for stage, by_name in others.items():
            if task.name in by_name:
                parts.append(_episode(by_name[task.name], titles[stage], pieces, is_open=False))
    return "\n".join(parts)


def _choose(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """Alternating won and lost, in the order of the file, so that nobody picked them by hand."""
    won: list[Trajectory] = []
    lost: list[Trajectory] = []
    for trajectory in trajectories:
        (won if trajectory.won else lost).append(trajectory)
        if min(len(won), len(lost)) >= _NUM_TASKS:
            break
    half = _NUM_TASKS // 2
    from_lost = min(len(lost), max(half, _NUM_TASKS - len(won)))
    first = won[:_NUM_TASKS - from_lost]
    second = lost[:from_lost]
    mixed = [t for pair in zip(first, second, strict=False) for t in pair]
    return mixed + first[len(second):] + second[len(first):]


def _episode(
    trajectory: Trajectory, title: str, pieces: Sequence[str] | None, *, is_open: bool
) -> str:
    outcome = "won" if trajectory.won else "lost"
    head = (
        f"{title}: <b class={outcome}>{outcome if trajectory.won else 'not won'}</b>, "
        f"{trajectory.num_turns} turns, score {trajectory.score:g} of {trajectory.max_score:g}, "
        f"ended by {html.escape(trajectory.stop_reason.value.replace('_', ' '))}"
    )
    sent = len(trajectory.sent_turns)
    turns = "\n".join(
        _turn(turn, pieces, is_sent=number < sent) for number, turn in enumerate(trajectory.turns)
    )
    return f"<details{' open' if is_open else ''}><summary>{head}</summary>\n{turns}\n</details>"


def _turn(turn: Turn, pieces: Sequence[str] | None, *, is_sent: bool) -> str:
    notes = []
    if turn.reward:
        notes.append(f"reward {turn.reward:+g}")
    if turn.intermediate_reward:
        notes.append(f"progress {turn.intermediate_reward:+g}")
    if not is_sent:
        notes.append("no end of turn: not sent")
    elif not turn.valid_command:
        notes.append("refused")
    if is_sent and turn.command != turn.action:
        notes.append(f"sent as: {turn.command}")
    return (
        f"<pre class=observation>{html.escape(turn.observation.strip())}</pre>\n"
        f"<div class=action>&gt; {_colored(turn, pieces)}"
        f"<span class=reward>{html.escape(', '.join(notes))}</span></div>"
    )


def _colored(turn: Turn, pieces: Sequence[str] | None) -> str:
    """The action token by token; without a tokenizer as one piece with its mean log-prob."""
    if pieces is None:
        mean = float(turn.logprobs.mean())
        return _token(turn.action, mean, float(turn.entropies.mean()))
    return "".join(
        # A model may have more rows than its tokenizer has tokens.
        _token(pieces[token] if token < len(pieces) else f"[{token}]", float(logprob), float(entropy))
        for token, logprob, entropy in zip(
            turn.action_ids, turn.logprobs, turn.entropies, strict=True)
    )


def _token(text: str, logprob: float, entropy: float) -> str:
    strength = min(1.0, max(0.0, logprob / _FAINT_LOGPROB))
    title = f"p = {math.exp(logprob):.3f}, log p = {logprob:.2f}, entropy = {entropy:.2f}"
    return (
        f'<span title="{title}" style="background:rgba(213,94,0,{strength:.2f})">'
        f"{html.escape(text)}</span>"
    )


def _token_texts(run: Run) -> list[str] | None:
    """Text of every token id, from the tokenizer the run kept; None when it kept none."""
    for folder in (run.root / "model", run.root / "tokenizer"):
        if (folder / "tokenizer.json").exists():
            tokenizer = tokenizer_lib.load(folder)
            return tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return None


def _read_trajectories(path: pathlib.Path, names: Collection[str] | None = None) -> Iterable[Trajectory]:
    """Those of the tasks with these names, by default all."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            if names is None or record["task"]["name"] in names:
                yield Trajectory.from_json(record)


def _configuration(run: Run) -> str:
    parts = []
    for name in ("config", "versions"):
        if name in run.content:
            text = html.escape(json.dumps(run.content[name], indent=2))
            parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>\n{body}\n</table>"


def _number(values: dict[str, float], key: str, digits: int) -> str:
    return f"{values[key]:.{digits}f}" if key in values else ""


def _share(values: dict[str, float], key: str) -> str:
    return f"{100 * values[key]:.1f} %" if key in values else ""
