"""A whole run: games → demonstrations → imitation → reinforcement learning → evaluation → report.

The state is `state` and what changes it is the line that assigns it. Every stage ends in a
checkpoint that remembers how many metric lines there were, so a killed run goes on exactly where
the newest checkpoint stands; what came after it is computed again, equal to the last bit.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxagentrl import (
    checkpoints,
    collapse,
    curriculum,
    evaluate,
    hosts,
    imitate,
    metrics,
    openings,
    pages,
    plan,
    plan_sampling,
    playing,
    precision,
    prepare,
    progress,
    reinforce,
    report,
    rewards,
    rules,
    settings,
    states,
    workdir,
)
from jaxagentrl.models import sharding
from jaxagentrl.types import TrainState

# How many times its plan a run on CPU has room for where it keeps the memory that its programs give back.
# That lies in pieces, and imitation's beside RL's: 3.2 times the plan were held (`docs/performance.md`,
# "Memory that is kept").
_ROOM_TO_KEEP = 4

# Keys that each process of a run may have for itself: they say how fast a result comes, not which. (`pool` has limits
# as well, beyond which episodes count as failures of their environment and are dropped.)
OWN_KEYS = ("compilation_cache_dir", "env.cache_dir", "env.num_workers", "memory_limit_gb", "pool")
# Keys that a run may be continued with other values of. A mesh changes results by rounding.
FREE_KEYS = (*OWN_KEYS, "mesh", "rl.num_iterations")
# Keys that came after the first runs, and what those did: they go on where a config says so. The others have no effect then.
LATER_KEYS = {
    "rl.filter.name": "none",
    "rl.filter.leave_out": [],
    "rl.branching.members": 0,
    "rl.curriculum.order": "uniform",
    "rl.curriculum.horizons": [],
    "reward.overlong_penalty": 0.0,
    "eval.attempts": 1,
    **dict.fromkeys(
        (
            "rl.filter.fraction", "rl.filter.max_rounds", "rl.branching.probability", "rl.branching.entropy_weight",
            "rl.branching.entropy_tokens", "rl.curriculum.share", "rl.curriculum.threshold", "rl.curriculum.window",
            "rl.curriculum.horizon_iterations", "reward.overlong_length", "reward.overlong_margin",
        ),
        workdir.ANY,
    ),
}


def run(config: Mapping[str, Any], directory: str) -> None:
    """Runs, or continues, the experiment of `config` in the folder `directory`."""
    settings.check(config)
    precision.keep_float32(config["learner"]["compute_dtype"])
    _keep_compiled_programs(config["compilation_cache_dir"])
    if not directory:
        raise ValueError("the workdir is empty, which would be the folder that the run is started in: name one.")
    root = pathlib.Path(directory).expanduser()
    _check_end(root, config["rl"]["num_iterations"])
    # A notebook keeps the frames of a cell that was interrupted, and with them what is not closed.
    with contextlib.closing(_open(root, config)) as folder:
        _run(config, folder)


def _run(config: Mapping[str, Any], folder: workdir.Workdir) -> None:
    unused = settings.unused(config)
    if unused:
        progress.notice(f"without effect in this run: {', '.join(unused)}")
    penalties = {name: config["reward"][name] for name in ("invalid_penalty", "no_end_of_turn_penalty")}
    told = rewards.way_out(**penalties, cut_turns=config["rollout"]["cut_turns"])
    if told and config["rl"]["num_iterations"]:
        progress.notice(told)
    if folder.replaced:
        progress.notice(
            f"{folder.root} held a run that had not begun; this one takes its place, with other "
            f"settings: {'; '.join(folder.replaced)}"
        )
    for change in folder.version_changes:
        progress.notice(f"package version differs from the run's first start: {change}")
    started = time.monotonic()
    with prepare.everything(config, folder) as setup, sharding.use(setup.mesh):
        _name_idle_devices(setup.mesh)
        programs, chain = reinforce.make_programs(config, setup.model, mesh=setup.mesh)
        stages, imitation = prepare.stages_ahead(config, folder), None
        if "imitation" in stages:
            imitation = imitate.make(config, setup.model, setup.chat_format, setup.replays)
        _plan(config, setup, stages, imitation, programs, chain)
        state, host = states.restore(folder, config, setup)
        if host["stage"] != "rl":  # a stage that is new in a run may have games that are new, too
            _read_openings(config, setup)
        playing.warm_up(config, setup, state.params)
        if folder.shared_root is not None:
            metrics.catch_up(folder.root, folder.shared_root, host["lines"])
        with metrics.Writer(folder.root, resume_lines=host["lines"]) as writer:
            session = playing.Session(config, folder, setup, writer)
            if host["stage"] == "start":
                seconds = {"time/prepare_s": time.monotonic() - started}
                values = _timed(seconds, playing.baselines, session, state.params)
                writer.write("baseline", 0, values)
                host = _save(session, state, stage="sft", step=0)
            # Checkpoints of earlier versions lack these two.
            if imitation is not None and not host.get("is_evaluated"):
                if not host.get("is_over"):
                    state = _imitate(session, imitation, state, host["step"])
                writer.write("eval", 0, _timed({}, playing.held_out, session, state.params, "sft"))
                if "RL" not in stages:  # else its first checkpoint follows
                    done = {"step": int(state.step), "is_over": True, "is_evaluated": True}
                    host = _save(session, state, stage="sft", **done)
            del imitation  # demonstrations and program are not needed any more
            if "RL" in stages:
                if host["stage"] == "sft":
                    state = states.begin_rl(state, config, setup)
                    host = _save(session, state, stage="rl", step=0)
                state = _reinforce(session, state, host, programs)
            states.export(folder, config, setup, state)
    if hosts.is_first():
        report.write(folder.root)
    hosts.wait("end")


def _keep_compiled_programs(directory: str | None) -> None:
    """Lets jax find again what an earlier process compiled; None leaves that to jax's own setting."""
    if directory is not None:
        folder = pathlib.Path(directory).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"compilation_cache_dir is {directory!r}, which cannot be made ({error.strerror}): give a folder that "
                "may be written to, or None."
            ) from error
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # The default keeps only what took a second, but a run has dozens of smaller programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _open(root: pathlib.Path, config: Mapping[str, Any]) -> workdir.Workdir:
    """The run's folder; other processes than the first keep their records in a folder within."""
    _check_processes_agree(config)
    folder = refused = None
    if hosts.is_first():
        try:
            folder = workdir.open_workdir(root, config, free_keys=FREE_KEYS, later_keys=LATER_KEYS)
            for stage in folder.checkpoints.glob("*"):
                checkpoints.remove_leftovers(stage)
        except workdir.WorkdirError as error:
            refused = error
    # What one refuses all refuse: the others would wait for it, and end with another error.
    refused = hosts.gather(refused)[0]
    if refused is not None:
        raise refused
    if folder is not None:
        return folder
    own = root / "processes" / f"{jax.process_index():03d}"
    folder = workdir.open_workdir(own, config, free_keys=FREE_KEYS, later_keys=LATER_KEYS)
    return dataclasses.replace(folder, shared_root=root)


def _check_processes_agree(config: Mapping[str, Any]) -> None:
    """A flag that one process was not given would make a run of two configs, which nothing shows.

    Raises:
        ValueError: in all processes.
    """
    shared = {
        path: value
        for path, value in settings.flat(config)
        if not any(workdir.is_under(path, key) for key in OWN_KEYS)
    }
    first, *others = hosts.gather(shared)
    for index, other in enumerate(others, 1):
        if differing := sorted(path for path in first.keys() | other.keys() if first.get(path) != other.get(path)):
            path = differing[0]
            raise ValueError(
                f"the processes of this run have different configs: {', '.join(differing)}. {path} is "
                f"{first.get(path)!r} in process 0 and {other.get(path)!r} in process {index}: give all the same flags."
            )


def _check_end(root: pathlib.Path, num_iterations: int) -> None:
    """A run may be given more iterations than it was started with, or fewer, but not fewer than it has."""
    done = checkpoints.latest_step(root / "checkpoints" / "rl")
    if done is not None and done > num_iterations:
        raise ValueError(
            f"rl.num_iterations is {num_iterations}, but the run in {root} has done {done}: ask for at "
            "least as many, or use another --workdir."
        )


def _read_openings(config: Mapping[str, Any], setup: prepare.Setup) -> None:
    """Says how long first prompts are, and refuses a run that would end where a long one is drawn."""
    sampled = sorted(set(setup.splits) - {"demo"})
    to_open = [task for split in sampled for task in setup.splits[split]]
    mine = hosts.share(to_open)
    with progress.bar("reading first prompts", len(mine)) as advance:
        lengths = openings.lengths(
            mine,
            setup.pool,
            setup.chat_format,
            prompt_style=config["prompt"]["style"],
            show_admissible=config["prompt"]["show_admissible"],
            advance=advance,
        )
    # The same for all processes, so that all of them refuse or none does.
    lengths = [length for part in hosts.gather(lengths) for length in part]
    sizes = {key: config["sampling"][key] for key in ("max_length", "max_turn_tokens")}
    progress.notice(openings.check(to_open, lengths, **sizes))


def _imitate(
    session: playing.Session, imitation: imitate.Imitation, state: TrainState, first_step: int
) -> TrainState:
    """Imitation from `first_step` on, to its last step or to where the demonstrations' loss, as logged,
    is at its target."""
    sft, setup = session.config["sft"], session.setup
    target = sft["target_loss"]
    steps = imitate.train(
        state,
        imitation,
        seed=session.config["seed"],
        first_step=first_step,
        num_steps=sft["num_steps"],
        batch_size=sft["batch_size"],
        observation_weight=sft["observation_weight"],
        frozen=setup.frozen,
        mesh=setup.mesh,
        **reinforce.part_shapes(session.config["learner"], setup.mesh),
    )
    since, recent = time.monotonic(), []
    with progress.bar("imitation", sft["num_steps"]) as advance:
        advance(first_step)
        for step, state, measured in steps:
            recent.append(measured)
            note, is_over = None, step == sft["num_steps"]
            if step % sft["log_every"] == 0 or is_over:
                values = metrics.mean(jax.device_get(recent))
                values = imitate.with_observation_mean(values, sft["observation_weight"])
                seconds = {"time/sft_s": time.monotonic() - since}
                since, recent = time.monotonic(), []
                session.writer.write("sft", step, values | seconds)
                note = f"loss {values['loss/action']:.3f}"
                is_over |= target is not None and values["loss/action"] <= target
            advance(note=note)
            if step % sft["save_every"] == 0 or is_over:
                _save(session, state, stage="sft", step=step, is_over=is_over)
            if is_over:
                break
    return state


def _plan(
    config: Mapping[str, Any],
    setup: prepare.Setup,
    stages: Sequence[plan.Stage],
    imitation: imitate.Imitation | None,
    programs: reinforce.Programs,
    chain: Any,
) -> None:
    """Says what memory each stage will take, and refuses a run that takes more than there is."""
    limit = plan.device_limit(config["memory_limit_gb"])
    at_sampling = plan_sampling.measured(
        setup.model,
        setup.trainable,
        setup.frozen,
        setup.mesh,
        options=config["sampling"],
        compute_dtype=config["learner"]["compute_dtype"],
        stop_ids=setup.stop_ids,
        restricted=rules.is_restricted(config["rollout"]),
        limit=limit,
    )
    shared = {"mesh": setup.mesh, "frozen": setup.frozen, "at_sampling": at_sampling, "limit": limit}

    def plans() -> Iterator[plan.Plan]:
        if imitation is not None:
            yield plan.of_imitation(config, imitation, setup.trainable, **shared)
        if "RL" in stages:
            yield plan.of_rl(config, programs, chain, setup.model, setup.trainable, **shared)
        if "evaluation" in stages:
            yield plan.of_evaluation(setup.trainable, **shared)

    peak = 0
    for made in plans():  # one after the other: a refusal does not wait for RL's program
        progress.notice(made.text())
        peak = max(peak, made.peak)
    if jax.default_backend() == "cpu" and _ROOM_TO_KEEP * peak <= limit:
        pages.keep()


def _reinforce(
    session: playing.Session, state: TrainState, host: Mapping[str, Any], programs: reinforce.Programs
) -> TrainState:
    """Reinforcement learning from iteration host["step"] on."""
    config, setup, rl = session.config, session.setup, session.config["rl"]
    reference = states.reference(session.folder, state, setup.mesh) if programs.needs_reference else {}
    sampler, lines = curriculum.make(setup.levels, rl["curriculum"], seed=config["seed"]), session.writer.of_phase("rl")
    if host["sampler"]:
        sampler.restore(host["sampler"])
    with progress.bar("reinforcement learning", rl["num_iterations"]) as advance:
        advance(host["step"])
        for iteration in range(host["step"], rl["num_iterations"]):
            clock = [time.monotonic()]
            played, kept, counts = playing.iteration(session, state.params, sampler, number=iteration)
            clock.append(time.monotonic())
            measured, credit = {}, []  # nothing to learn from where every environment failed, or a filter kept nothing
            if kept:
                state, measured, credit = reinforce.learn(
                    state,
                    reference,
                    kept,
                    programs,
                    config,
                    iteration=iteration,
                    frozen=setup.frozen,
                )
            elif played.trajectories and not (lines and lines[-1].get("filter/groups_kept") == 0):  # once in a row
                progress.notice(
                    f"iteration {iteration + 1} learned nothing: of {counts['filter/groups_played']:.0f} games none was won by "
                    "some of a group and lost by others (rl.filter.name 'dynamic_sampling')"
                )
            state = dataclasses.replace(state, iteration=state.iteration + 1)
            clock.append(time.monotonic())
            values = measured | counts | evaluate.summary("rollout", played)
            values |= {f"ledger/{key}": value for key, value in played.ledger.items()}
            done, last = iteration + 1, iteration + 1 == rl["num_iterations"]
            if done % rl["eval_every"] == 0 or last:
                values |= playing.held_out(session, state.params, "rl", keep=last)
                records = reinforce.records(played.trajectories, kept, credit, config["reward"])
                playing.write_episodes(session, f"rl_{done:06d}", records)
            values |= {
                "time/rollout_s": clock[1] - clock[0],
                "time/update_s": clock[2] - clock[1],
                "time/evaluate_s": time.monotonic() - clock[2],
            }
            try:
                lines.append(session.writer.write("rl", done, values))
            except metrics.NonFiniteError:
                records = reinforce.records(played.trajectories, kept, credit, config["reward"])
                playing.write_episodes(session, f"nonfinite_rl_{done:06d}", records)
                raise
            for told in (collapse.told(lines), curriculum.told(lines, list(setup.levels))):
                if told:
                    progress.notice(told)
            advance(note=_note(values))
            if done % rl["save_every"] == 0 or last:
                _save(session, state, stage="rl", step=done, sampler=sampler.state())
    return state


def _note(values: Mapping[str, float]) -> str:
    """What stands beside the bar: how well it goes, what sampling waited for, and how full it was."""
    ledger = {key[7:]: value for key, value in values.items() if key.startswith("ledger/")}
    success = values.get("rollout/success_rate")
    told = "no episode ended" if success is None else f"success {success:.2f}"
    parts = ("extend", "decode", "transfer", "compile", "environment", "host")
    shares = [f"{name} {ledger[f'{name}_share']:.0%}" for name in parts]
    return (
        f"{told}, sampling {ledger['seconds']:.1f} s: "
        + ", ".join(share for share, name in zip(shares, parts) if ledger[f"{name}_share"] >= 0.05)
        + f"; tokens {ledger['tokens_decoded']:,.0f} sampled, {ledger['tokens_prefilled']:,.0f} prefilled"
        f" (again each turn: {ledger['tokens_reprefill']:,.0f}); slots {ledger['slot_occupancy']:.0%} taken,"
        f" padding {ledger['padding_share']:.0%}"
    )


def _timed(values: dict[str, float], measure: Any, *arguments: Any) -> dict[str, float]:
    """Adds what `measure` returns and how long it took."""
    since = time.monotonic()
    return values | measure(*arguments) | {"time/evaluate_s": time.monotonic() - since}


def _name_idle_devices(mesh: jax.sharding.Mesh | None) -> None:
    """One process may leave devices idle, which is easily done without meaning it."""
    used, there = 1 if mesh is None else mesh.size, jax.device_count()
    if used < there:
        progress.notice(
            f"{used} of {there} devices are used: mesh.data=-1 takes all of them (docs/scale.md)"
        )


def _save(
    session: playing.Session,
    state: TrainState,
    *,
    stage: str,
    step: int,
    sampler: Any = None,
    is_over: bool = False,
    is_evaluated: bool = False,
) -> dict[str, Any]:
    session.writer.flush()
    host = {
        "stage": stage,
        "step": step,
        "is_over": is_over,
        "is_evaluated": is_evaluated,
        "lines": session.writer.num_lines,
        "sampler": sampler or {},
    }
    checkpoints.save(session.folder.checkpoints / stage, step=step, state=state, host=host)
    return host
