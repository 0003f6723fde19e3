"""The model card that a run leaves beside its weights: what they are, what they win, and what they came from.

A number on games says little without the games: the card names their families and seeds and has the hashes of every
split, the versions of packages, and all settings but the paths of the machine.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from jaxagentrl import report_data, workdir

# What says where things lay on a machine, and nothing about a result.
_PLACES = ("compilation_cache_dir", "directory", "cache_dir", "path", "data_dir", "instances", "repository",
           "repositories")


# A card with this line is the run's to write again.
_OURS = "<!-- Written by jaxagentrl at the end of a run. Without this line a later one leaves the file as it is. -->"


def write(run: report_data.Run) -> None:
    """Writes README.md beside the weights that there are, unless somebody has made it their own."""
    for name, library in (("model", "transformers"), ("adapters", "peft")):
        path = run.root / name / "README.md"
        if path.parent.is_dir() and (not path.exists() or _OURS in path.read_text(encoding="utf-8")):
            workdir.write_atomic(path, text(run, library=library))


def text(run: report_data.Run, *, library: str) -> str:
    """The card in Markdown, with the header that the Hugging Face Hub reads.

    Args:
        run: with its config.
        library: whose folder it is in: "transformers", or "peft" for adapters.
    """
    config, facts = run.content["config"], run.content.get("facts", {})
    env, base = config["env"], config["model"]["directory"]
    tags = ["jaxagentrl", "reinforcement-learning", env["params"].get("family", env["name"])]
    lines = [
        "---",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(dict.fromkeys(tags))}]",
        "---",
        "",
        _OURS,
        "",
        f"# An agent for {_games(env['params'])}",
        "",
        f"{_origin(base, library)} Trained with jaxagentrl by {_training(config, run)}.{_past(run.content)}",
        "",
        "## What it wins",
        "",
        f"One episode of each held-out task, at temperature {config['eval']['temperature']:g}; games that are in no other "
        "split, with 95 % intervals by Wilson. One training run, of one seed.",
        "",
        "| agent | won | success | refused commands |",
        "|---|---|---|---|",
        *_rows(run),
        "",
        *(told + "\n" for told in report_data.verdicts(run)),
        "## Games",
        "",
        "| split | seeds | SHA-256 of all its games |",
        "|---|---|---|",
        *_splits(config, facts.get("games", {})),
        "",
        "## How to use it",
        "",
        *_use(config, library),
        "",
        "## What it was made with",
        "",
        ", ".join(f"{name} {version}" for name, version in run.content.get("versions", {}).items()) + ".",
        "",
        "<details><summary>All settings</summary>",
        "",
        "```json",
        json.dumps(_without_places(config), indent=1, ensure_ascii=False),
        "```",
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def _games(params: Mapping[str, Any]) -> str:
    told = [f"{key} {value}" for key, value in params.items() if key != "family" and key not in _PLACES]
    return f"{params.get('family', 'tasks')} ({', '.join(told)})" if told else params.get("family", "tasks")


def _origin(base: str | None, library: str) -> str:
    if base is None:
        return "A transformer trained from scratch, with a tokenizer of its games' text."
    name = pathlib.PurePath(base).name
    return f"Adapters for `{name}`." if library == "peft" else f"`{name}`, trained further."


def _training(config: Mapping[str, Any], run: report_data.Run) -> str:
    """"imitation (240 steps of 16 walkthroughs at most), then 160 iterations of RL ..." """
    parts = []
    if steps := [line["step"] for line in run.phase("sft")]:
        parts.append(f"{steps[-1]} steps of imitating {config['sft']['batch_size']} demonstrations")
    if iterations := [line["step"] for line in run.phase("rl")]:
        rl = config["rl"]
        parts.append(
            f"{iterations[-1]} iterations of RL ({rl['tasks_per_iteration']} games × {rl['group_size']}, advantages "
            f"`{rl['advantage']['name']}`, surrogate `{rl['loss']['surrogate']}`, reward `{config['reward']['kind']}`)"
        )
    return f"{' and '.join(parts) or 'nothing yet'}, seed {config['seed']}"


def _past(content: Mapping[str, Any]) -> str:
    """Of a run that was forked: where its settings were others, and which, but for the places of a machine."""
    told = ""
    for fork in content.get("forked", []):
        changed = [line for line in fork["changed"] if line.split(":", 1)[0].split(".")[-1] not in _PLACES]
        told += f" After {fork['after']} was changed: {'; '.join(changed)}." if changed else ""
    return told


def _rows(run: report_data.Run) -> Iterator[str]:
    for evaluation in run.compared:
        values = evaluation.values
        refused = f"{100 * values['invalid_command_rate']:.0f} %" if "invalid_command_rate" in values else ""
        won = f"{values['successes']:.0f}/{evaluation.episodes}"
        yield f"| {evaluation.name} | {won} | {report_data.percent(evaluation)} | {refused} |"


def _splits(config: Mapping[str, Any], digests: Mapping[str, str]) -> Iterator[str]:
    for name, (first, count, *changes) in config["splits"].items():
        if name in digests:
            world = f", {_games(changes[0])}" if changes else ""
            yield f"| {name} | {first} to {first + count - 1}{world} | `{digests[name]}` |"


def _use(config: Mapping[str, Any], library: str) -> list[str]:
    asked = f"It is asked by messages of prompt style `{config['prompt']['style']}` and answers with a command a turn."
    if library == "peft":
        return [f"{asked} The adapters are loaded over their model by `peft.PeftModel.from_pretrained`."]
    return [
        f"{asked} Any library loads it that loads a folder of `transformers`. Evaluated once more, with the `env` and "
        "`splits` below in a config:",
        "",
        "    python -m jaxagentrl.main --config=<config>.py --workdir=runs/again \\",
        "      --config.model.directory=<this folder> --config.tokenizer.directory=<this folder> \\",
        "      --config.sft.num_steps=0 --config.rl.num_iterations=0",
    ]


def _without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_places(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _PLACES
    }
