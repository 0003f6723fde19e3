"""The folder a run leaves behind: its layout, its config, and writes that a kill cannot tear.

    config.json       the resolved config, package versions, facts recorded once (game hashes)
    metrics.jsonl     one line per (phase, step)              tensorboard/   the same as events
    checkpoints/      see checkpoints.py                      trajectories/  episodes, ids and text
    tokenizer/        for runs that train their own           model/         Hugging Face format
    adapters/         PEFT format, for runs that export them apart from their model
    curves.png  report.html

A workdir belongs to one config: `open_workdir` writes it the first time and compares it ever after,
so that a resumed run can never silently become another experiment. Only where nothing has been measured
or learned yet does another config take the folder over: a run that was refused, by its memory plan for
example, is changed and started again by the same command.
"""

import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

VERSIONED_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy",
    "textworld", "alfworld", "gymnasium",
)
_LAYOUT = (
    "metrics.jsonl", "tensorboard", "checkpoints", "trajectories", "tokenizer", "model", "adapters",
    "curves.png", "report.html",
)
# What a run has from its first measurement on; not what it prepares.
_BEGUN = ("checkpoints", "trajectories", "model", "adapters")
# What it needs to go on elsewhere; the rest is made again at its end.
_FORKED = ("metrics.jsonl", "tensorboard", "checkpoints", "trajectories", "tokenizer")
_MAX_LISTED = 8

ANY = object()  # of `open_workdir`'s later_keys


class WorkdirError(ValueError):
    """The workdir cannot serve this run; the message names the folder and the way out."""


@dataclasses.dataclass
class Workdir:
    """Paths inside one run's folder. Made by `open_workdir`.

    Attributes:
        root: the folder.
        version_changes: one line per package whose version differs from the run's first start
            (empty for a new run). The run may go on; the caller should say so aloud.
        replaced: one line per key that differs from the config of a run that had not begun, whose
            place this one takes. The caller should say so, too.
        shared_root: where several processes of one run have their checkpoints and tokenizer; None
            is `root`.
    """

    root: pathlib.Path
    version_changes: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    shared_root: pathlib.Path | None = None
    _lock: TextIO | None = dataclasses.field(default=None, repr=False)

    @property
    def config(self) -> pathlib.Path:
        return self.root / "config.json"

    @property
    def metrics(self) -> pathlib.Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> pathlib.Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> pathlib.Path:
        return (self.shared_root or self.root) / "checkpoints"

    @property
    def trajectories(self) -> pathlib.Path:
        return self.root / "trajectories"

    @property
    def tokenizer(self) -> pathlib.Path:
        return (self.shared_root or self.root) / "tokenizer"

    @property
    def model(self) -> pathlib.Path:
        return self.root / "model"

    @property
    def adapters(self) -> pathlib.Path:
        return self.root / "adapters"

    @property
    def curves(self) -> pathlib.Path:
        return self.root / "curves.png"

    @property
    def report(self) -> pathlib.Path:
        return self.root / "report.html"

    def record(self, name: str, values: Mapping[str, Any]) -> None:
        """Keeps facts that must never change during the run, such as the hash of each split's games.

        The first call writes them under `name` in config.json. Later ones compare what is there already,
        and add what is new: a run may be given a stage that it did not have.

        Raises:
            WorkdirError: some of `values` differ from what the run started with.
        """
        content = _read_json(self.config)
        known = content.setdefault("facts", {}).setdefault(name, {})
        values = _as_json(values, f"the facts {name!r}")
        changed = [
            line for key in known.keys() & values.keys()
            for line in differences(known[key], values[key], f"{name}.{key}")
        ]
        if changed:
            raise WorkdirError(
                f"{self.root}: this run started with other {name} than it finds now: "
                f"{_listed(changed)}. To go on, restore what it started with; to start again "
                "with what is there now, use another --workdir."
            )
        if values.keys() - known.keys():
            known |= values
            write_atomic(self.config, json.dumps(content, indent=2) + "\n")

    def close(self) -> None:
        """Lets another process use the folder. The end of the process does so too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def open_workdir(
    path: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    free_keys: Iterable[str] = (),
    later_keys: Mapping[str, Any] = {},
) -> Workdir:
    """Creates or re-opens a run's folder and locks it against a second process.

    Args:
        path: the folder; its parents are created.
        config: the resolved config as nested dicts of JSON values.
        free_keys: dotted keys (or prefixes of such) that may differ between starts because they
            cannot change the result, for example "env.num_workers". The newest are kept.
        later_keys: dotted keys that configs of earlier versions lack, and what their runs did without them; ANY where
            that is the same by any value, as long as the others say it.

    Raises:
        WorkdirError: the folder cannot be written, is in use, is not a workdir, or holds a run of
            another config that has begun. Nothing in it is changed in any of these cases.
    """
    root = pathlib.Path(path).expanduser()
    _make_writable(root)
    config = _as_json(dict(config), "the config")
    with contextlib.ExitStack() as on_error:
        lock = _lock(root)
        if lock is not None:
            on_error.callback(lock.close)
        changes, replaced = _write_or_compare_config(root, config, tuple(free_keys), later_keys)
        _remove_leftovers(root)
        on_error.pop_all()
    return Workdir(root, version_changes=changes, replaced=replaced, _lock=lock)


def content(root: str | os.PathLike) -> dict[str, Any]:
    """What a run's config.json holds: its "config", "versions" and "facts".

    Raises:
        WorkdirError: the folder is none of a run.
    """
    root = pathlib.Path(root).expanduser()
    if not (root / "config.json").is_file():
        raise WorkdirError(f"{root} holds no config.json: name the workdir of a run.")
    return _read_json(root / "config.json")


def fork(
    source: str | os.PathLike,
    path: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    may_differ: Iterable[str],
    later_keys: Mapping[str, Any] = {},
    after: str,
) -> list[str]:
    """Copies what a run has to go on from, so that it goes on in another folder by another config.

    Args:
        source: the run's workdir, which nobody writes into meanwhile and which stays as it is.
        path: a folder that is not there, or is empty.
        config: of the new run.
        may_differ: dotted keys, or prefixes of such, that may be others than the run's.
        later_keys: as of `open_workdir`.
        after: what the new run keeps in config.json about where it left the other's settings.

    Returns:
        One line per key that differs.

    Raises:
        WorkdirError: there is no such run, it has no checkpoint, is in use or one of several processes, the new folder
            holds something, or keys differ that may not.
    """
    root, target = pathlib.Path(source).expanduser(), pathlib.Path(path).expanduser()
    config, keys, found = _as_json(dict(config), "the config"), tuple(may_differ), content(root)
    for is_wrong, message in (
        ((root / "processes").exists(), f"{root} is of a run of several processes, which cannot be forked."),
        (not (root / "checkpoints").exists(), f"{root} has no checkpoint yet: start a new run instead."),
        (target.exists() and any(target.iterdir()), f"{target} holds something: give --workdir a folder that is new."),
    ):
        if is_wrong:
            raise WorkdirError(message)
    lock = _lock(root)
    with contextlib.closing(lock) if lock is not None else contextlib.nullcontext():
        changed = differences(_with_later(found["config"], config, later_keys), config, "")
        refused = [line for line in changed if not any(is_under(line.split(":", 1)[0], key) for key in keys)]
        if refused:
            raise WorkdirError(
                f"{root} has a checkpoint that other values of {len(refused)} key(s) do not fit, or a past that they would "
                f"not tell (there → here): {_listed(refused)}. Keep the run's, or start a new run."
            )
        past = [*found.get("forked", []), {"after": after, "changed": changed}]
        with replacing_folder(target) as new:
            for name in _FORKED:
                if (root / name).is_dir():
                    shutil.copytree(root / name, new / name)
                elif (root / name).exists():
                    shutil.copy2(root / name, new / name)
            write_atomic(new / "config.json", json.dumps(found | {"config": config, "forked": past}, indent=2) + "\n")
    return changed


def write_atomic(path: str | os.PathLike, data: str | bytes) -> None:
    """Writes a file so that a kill at any moment leaves the old content or the new one."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def fsync_folder(path: str | os.PathLike) -> None:
    """Makes renames and deletions inside a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike, *, keeping: Sequence[str] = ()) -> Iterator[pathlib.Path]:
    """A folder to write into that takes the place of `path` only when the block ends well.

    A folder cannot be replaced by one rename, so a kill between the two renames leaves the new one
    complete beside its place; the next `replacing_folder` or `finish_replacing` puts it there.

    Args:
        path: the folder.
        keeping: names of files of the old folder that the new one gets, if it has none of the name.
    """
    path = pathlib.Path(path)
    finish_replacing(path)
    temporary = path.with_name(f".{path.name}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    yield temporary
    for name in keeping:
        if (path / name).is_file() and not (temporary / name).exists():
            shutil.copy2(path / name, temporary / name)
    os.rename(temporary, path.with_name(f".{path.name}.complete"))
    finish_replacing(path)


def finish_replacing(path: str | os.PathLike) -> None:
    """Puts a folder in place that a killed `replacing_folder` had completed. Else does nothing."""
    path = pathlib.Path(path)
    complete = path.with_name(f".{path.name}.complete")
    if not complete.exists():
        return
    if path.exists():
        shutil.rmtree(path)
    os.rename(complete, path)
    fsync_folder(path.parent)


def _make_writable(root: pathlib.Path) -> None:
    """Creates the folder and proves that a file can be written in it."""
    probe = root / ".write_test"
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise WorkdirError(
            f"cannot write to the workdir {root}: {error.strerror} ({error.filename}). Give "
            "--workdir a folder that you can create files in, on a disk with free space."
        ) from error


def _lock(root: pathlib.Path) -> TextIO | None:
    """Takes the folder's lock; the kernel gives it back however the process ends."""
    file = open(root / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
            return None   # some network drives have no locks; the run works without
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise WorkdirError(
                f"{root} is in use by another running process. Wait for it or stop it, or use "
                "another --workdir."
            ) from error
        raise
    return file


def _write_or_compare_config(
    root: pathlib.Path, config: dict[str, Any], free_keys: tuple[str, ...], later_keys: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Writes config.json of a new workdir, compares that of an old one.

    Returns:
        `Workdir.version_changes` and `Workdir.replaced`.
    """
    path = root / "config.json"
    versions = _versions()
    if not path.exists():
        _refuse_foreign_folder(root)
        _write_config(path, config, versions)
        return (), ()
    content = _read_json(path)
    if "config" not in content or "versions" not in content:
        raise WorkdirError(
            f"{path} was not written by a jaxagentrl run (it has no 'config' and 'versions'). Use "
            "another --workdir."
        )
    changed = [
        line for line in differences(_with_later(content["config"], config, later_keys), config, "")
        if not any(is_under(line.split(":", 1)[0], key) for key in free_keys)
    ]
    if changed and not _has_begun(root):
        if (root / "tokenizer").exists():  # made by the other config
            shutil.rmtree(root / "tokenizer")
        _write_config(path, config, versions)
        return (), tuple(changed)
    if changed:
        raise WorkdirError(
            f"{root} holds a run of another config. {len(changed)} key(s) differ (there → "
            f"here): {_listed(changed)}. Use another --workdir, or the config the run was "
            "started with, or go on from it in another folder (tools/fork_run.py); the old run has not been touched."
        )
    if content["config"] != config:  # as of its newest start
        write_atomic(path, json.dumps(content | {"config": config}, indent=2) + "\n")
    return tuple(differences(content["versions"], versions, "")), ()


def _with_later(old: dict[str, Any], new: dict[str, Any], later_keys: Mapping[str, Any]) -> dict[str, Any]:
    """The old config with those of the later keys that it lacks; the new one has all of them."""
    old = json.loads(json.dumps(old))
    for key, value in later_keys.items():
        *sections, name = key.split(".")
        there, here = old, new
        for section in sections:
            there, here = there.setdefault(section, {}), here[section]
        there.setdefault(name, here[name] if value is ANY else value)
    return old


def _write_config(path: pathlib.Path, config: dict[str, Any], versions: dict[str, str]) -> None:
    content = {"config": config, "versions": versions, "facts": {}}
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def _has_begun(root: pathlib.Path) -> bool:
    """Whether the folder's run has measured or learned anything."""
    lines = root / "metrics.jsonl"
    return any((root / name).exists() for name in _BEGUN) or (lines.exists() and lines.stat().st_size > 0)


def _refuse_foreign_folder(root: pathlib.Path) -> None:
    """Parts of a run without its config.json cannot be compared with this config."""
    ours = [field for field in _LAYOUT if (root / field).exists()]
    if ours:
        raise WorkdirError(
            f"{root} holds parts of a run ({_listed(ours)}) but no config.json, so it cannot be "
            "told whose they are. Restore config.json, or use another --workdir."
        )


def _remove_leftovers(root: pathlib.Path) -> None:
    """Clears what a killed process was writing when it died."""
    for temporary in root.glob(".*.tmp"):
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink()


def _versions() -> dict[str, str]:
    """Python and the packages that can change a run's numbers."""
    versions = {"python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _as_json(value: Any, what: str) -> Any:
    """The value as JSON gives it back (tuples become lists), so that comparisons are fair."""
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise WorkdirError(f"{what} holds a value that JSON cannot: {error}.") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WorkdirError(
            f"{path} cannot be read as JSON ({error}). It is written once by the run and not meant "
            "to be edited; restore it, or use another --workdir."
        ) from error
    if not isinstance(content, dict):
        raise WorkdirError(f"{path} holds {type(content).__name__}, expected an object.")
    return content


def differences(old: Any, new: Any, key: str) -> list[str]:
    """Lines "key: old → new" for every leaf that differs, absent ones included."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted(set(old) | set(new)):
            child = f"{key}.{name}" if key else name
            if name not in old:
                lines.append(f"{child}: (absent) → {_shown(new[name])}")
            elif name not in new:
                lines.append(f"{child}: {_shown(old[name])} → (absent)")
            else:
                lines += differences(old[name], new[name], child)
        return lines
    # 1 == 1.0 == True in Python; a config where one became the other is still another config.
    if old != new or isinstance(old, bool) != isinstance(new, bool):
        return [f"{key}: {_shown(old)} → {_shown(new)}"]
    return []


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_under(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(prefix + ".")


def _listed(lines: list[str]) -> str:
    rest = len(lines) - _MAX_LISTED
    return "; ".join(lines[:_MAX_LISTED]) + (f"; and {rest} more" if rest > 0 else "")
