"""Draws what `tools/bench_rollout.py --record` measured: how many times faster ours samples.

    python tools/plot_rollout.py rollout.jsonl docs/rollout.png

One group of bars for each size and number of turns, one bar for each contender that was measured;
where a case was measured several times, the last one counts.
"""

import argparse
import json
import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

CONTENDERS = {  # as named by the benchmark: (label, color of Okabe and Ito's palette)
    "kept": ("transformers, cache kept", "#56B4E9"),
    "reprefill": ("transformers, prefilled again", "#0072B2"),
    "tunix": ("Tunix's vanilla sampler", "#E69F00"),
}


def _parameters(size: str) -> float:
    """"25M" -> 25e6; "tiny", which is for trying the benchmark only, comes first."""
    return 0.0 if size == "tiny" else float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]


def read(record: str) -> dict[tuple[float, int, int], tuple[str, dict[str, float]]]:
    """How many times faster ours was than whom, by parameters, turns and size of groups.

    Raises:
        SystemExit: it is no record of the benchmark.
    """
    cases = {}
    try:
        for line in pathlib.Path(record).read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            rates = result["turns_per_second"]
            ratios = {name: rates["ours"] / rates[name] for name in rates if name != "ours"}
            key = _parameters(result["size"]), result["turns"], result.get("group_size", 1)
            cases[key] = result["size"], ratios
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{record} is no file that bench_rollout.py --record wrote: {error!r}.") from error
    if not any(ratios for _, ratios in cases.values()):
        raise SystemExit(f"{record} compares ours with nobody: run bench_rollout.py --record={record} first.")
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record")
    parser.add_argument("image")
    args = parser.parse_args()

    cases = read(args.record)
    figure = Figure(figsize=(9, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    measured = [name for name in CONTENDERS if any(name in ratios for _, ratios in cases.values())]
    width = 0.8 / len(measured)
    for offset, name in enumerate(measured):
        label, color = CONTENDERS[name]
        places, heights = [], []
        for place, key in enumerate(sorted(cases)):
            if name in cases[key][1]:
                places.append(place + (offset - (len(measured) - 1) / 2) * width)
                heights.append(cases[key][1][name])
        bars = axes.bar(places, heights, width, label=label, color=color)
        axes.bar_label(bars, [f"{height:.1f}" for height in heights], padding=2, fontsize=9)
    axes.axhline(1, color="#666666", linewidth=1)
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("times faster (turns per second)")
    labels = [
        f"{cases[key][0]} parameters\n{key[1]} turns" + (f", groups of {key[2]}" if key[2] > 1 else "")
        for key in sorted(cases)
    ]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_title("Multi-turn sampling: how many times faster jaxagentrl is than", loc="left")
    figure.legend(loc="outside lower center", ncols=len(measured), frameon=False)
    figure.savefig(args.image, metadata={"Software": None})


if __name__ == "__main__":
    main()
