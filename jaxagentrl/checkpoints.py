"""Saves and restores a run: the device state by Orbax, the host state as JSON, as one unit.

    checkpoints/<stage>/000007_step_350/
      checkpoint.json     format version, step, host state, name, shape and type of every leaf,
                          checksum of every file
      state/              an Orbax checkpoint: large leaves one by one, small ones packed

A checkpoint is written under a name that `restore` ignores and renamed when it is complete, so a
kill at any moment leaves the old one or the new one. Folders are numbered in the order of saving:
the latest is the highest number, whatever the step counts. Imitation and RL have folders of their own.

Orbax spends about 3 ms per array however small, so leaves of at most 4 MiB that live whole on every
device are packed as bytes into one array, and nothing is compressed (trained weights shrink by a
tenth at best). On two CPU cores a 30 MB state of 43 leaves then saves in 60 ms instead of 250; its
checksums take 11 more.
"""

import json
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxagentrl import hosts, workdir

FORMAT_VERSION = 1

_FOLDER = re.compile(r"(\d{6,})_step_(\d+)")
_PACK_LIMIT_BYTES = 4 << 20
_MAX_LISTED = 12
_READ_BYTES = 16 << 20


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the folder and the way out."""


def save(
    directory: str | os.PathLike,
    *,
    step: int,
    state: Any,
    host: Mapping[str, Any],
    keep: int = 2,
) -> pathlib.Path:
    """Writes one checkpoint and removes all but the newest `keep`.

    With several processes every one of them calls this with the same arguments.

    Args:
        directory: the folder of checkpoints, created when missing.
        step: shown in the folder's name; for people.
        state: a pytree of jax or numpy arrays.
        host: JSON values in dicts with string keys; tuples come back as lists.
        keep: how many checkpoints stay, at least 1.

    Returns:
        The folder of the new checkpoint.

    Raises:
        TypeError: `host` holds what JSON would lose, or `state` something that is no array.
        CheckpointError: it cannot be written; the checkpoints before it are as they were.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, expected at least 1: the newest checkpoint always stays")
    directory = pathlib.Path(directory).absolute()
    _check_jsonable(host, "host")
    leaves = _named_leaves(state)
    arrays, packing = _pack(leaves)
    existing = _complete(directory)
    # On a drive that is shared a process may see a folder as it was a while ago.
    number = hosts.gather(existing[-1][0] + 1 if existing else 0)[0]
    folder = directory / f"{number:06d}_step_{step}"
    temporary = directory / f".saving-{folder.name}"

    if hosts.is_first():
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory)
        temporary.mkdir()
    hosts.wait("checkpoint_begin")
    try:
        with ocp.Checkpointer(_handler()) as checkpointer:
            checkpointer.save(temporary / "state", args=ocp.args.PyTreeSave(arrays))
    except Exception as error:  # a plain one is what TensorStore raises where the disk is full
        if hosts.may_be_of_another(error):
            raise
        reason = str(error).splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(
            f"the checkpoint {folder} cannot be written ({reason[0][:300]}). Those before it are whole: make room, and "
            "the same command continues from the last one."
        ) from error
    # On a drive that is shared a process may not see yet what another one has written.
    files = hosts.gather(_files(temporary / "state"))[0]
    checksums = hosts.gather(_checksums(temporary / "state", hosts.share(files)))
    if hosts.is_first():
        record = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "leaves": {
                name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), **packing[name]}
                for name, leaf in leaves.items()
            },
            "files": {name: number for part in checksums for name, number in part.items()},
            "host": host,
        }
        workdir.write_atomic(temporary / "checkpoint.json", json.dumps(record))
        os.rename(temporary, folder)
        workdir.fsync_folder(directory)
        for _, old in _complete(directory)[:-keep]:
            _remove(old)
    hosts.wait("checkpoint_end")
    return folder


def restore(directory: str | os.PathLike, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """Reads the newest complete checkpoint.

    Args:
        directory: the folder given to `save`.
        like: a pytree of arrays or `jax.ShapeDtypeStruct` with the structure, shapes, types and
            (where set) shardings that the result shall have. Without one a leaf is on the default device and not
            bound to it, as what was computed there is: bound ones are other programs to jax.

    Returns:
        (state, host), bit for bit what was saved, or None when there is no checkpoint. Every file is
        held to its checksum, of which checkpoints of earlier versions have none.

    Raises:
        CheckpointError: the checkpoint is of a newer format, damaged, or of another model.
    """
    complete = _complete(pathlib.Path(directory).absolute())
    if not complete:
        return None
    folder = complete[-1][1]
    record = _read_record(folder)
    expected = _named_leaves(like)
    _check_leaves(folder, record["leaves"], expected)
    _check_files(folder, record["files"])

    large = {
        name: leaf for name, leaf in expected.items() if "offset" not in record["leaves"][name]
    }
    try:
        arrays = _read_arrays(folder / "state", large, packed=len(large) < len(expected))
    except Exception as error:  # a plain one is what TensorStore raises where it cannot decode
        if hosts.may_be_of_another(error):
            raise
        reason = str(error).splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(_damaged(folder, f"it cannot be read ({reason[0][:200]})")) from error
    values = {}
    for name, leaf in expected.items():
        if name in large:
            found = arrays["large"][name]
            values[name] = found if isinstance(found, jax.Array) else jax.device_put(found)
        else:
            values[name] = _unpack(arrays["packed"], record["leaves"][name], _sharding(leaf))
    treedef = jax.tree_util.tree_structure(like)
    return jax.tree_util.tree_unflatten(treedef, list(values.values())), record["host"]


def latest_step(directory: str | os.PathLike) -> int | None:
    """The step of the newest complete checkpoint, None when there is none."""
    complete = _complete(pathlib.Path(directory).absolute())
    return _read_record(complete[-1][1])["step"] if complete else None


def latest_host(directory: str | os.PathLike) -> dict[str, Any]:
    """What `save` was given as `host` with the newest complete checkpoint; empty when there is none."""
    complete = _complete(pathlib.Path(directory).absolute())
    return _read_record(complete[-1][1])["host"] if complete else {}


def _handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path such as "params/embed/embedding", in the order of jax.tree.leaves."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise ValueError(f"two leaves of the state have the same path {name!r}")
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
            raise TypeError(f"{name} of the state is {type(leaf).__name__}, expected an array")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{name} of the state is a typed key, expected its jax.random.key_data")
        leaves[name] = leaf
    return leaves


def _pack(leaves: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """Splits leaves into large ones and one byte array.

    Returns:
        The tree for Orbax, and per leaf {"offset": byte position} or {} for large ones.
    """
    large, pieces, packing, offset = {}, [], {}, 0
    for name, leaf in leaves.items():
        whole = not isinstance(leaf, jax.Array) or leaf.is_fully_replicated
        if whole and leaf.nbytes <= _PACK_LIMIT_BYTES:
            pieces.append(np.ascontiguousarray(jax.device_get(leaf)).reshape(-1).view(np.uint8))
            packing[name] = {"offset": offset}
            offset += leaf.nbytes
        else:
            large[name] = leaf
            packing[name] = {}
    arrays: dict[str, Any] = {}
    if large:
        arrays["large"] = large
    if pieces:
        arrays["packed"] = np.concatenate(pieces)
    if not arrays or arrays.get("packed", np.zeros(1)).size == 0:
        raise ValueError("the state has no numbers in it: nothing to save")
    return arrays, packing


def _unpack(packed: np.ndarray, entry: Mapping[str, Any], sharding: Any) -> jax.Array:
    dtype = jax.numpy.dtype(entry["dtype"])
    shape = tuple(entry["shape"])
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = packed[entry["offset"]:entry["offset"] + num_bytes]
    # A copy, because device_put on CPU may alias an aligned numpy array.
    value = np.array(raw).view(dtype).reshape(shape)
    if sharding is None:
        return jax.device_put(value)
    return jax.make_array_from_callback(shape, sharding, lambda index: value[index])


def _sharding(leaf: Any) -> Any:
    return leaf.sharding if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) else None


def _read_arrays(
    folder: pathlib.Path, large: Mapping[str, Any], *, packed: bool
) -> dict[str, Any]:
    """Reads the Orbax part; large leaves land directly in their shardings, and are numpy's without one."""
    restore_args: dict[str, Any] = {}
    item: dict[str, Any] = {}
    if large:
        item["large"] = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in large.items()
        }
        restore_args["large"] = {
            name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
            if _sharding(leaf) is None
            else ocp.ArrayRestoreArgs(sharding=_sharding(leaf), global_shape=leaf.shape, dtype=leaf.dtype)
            for name, leaf in large.items()
        }
    if packed:
        item["packed"] = 0
        restore_args["packed"] = ocp.RestoreArgs(restore_type=np.ndarray)
    with ocp.Checkpointer(_handler()) as checkpointer:
        return checkpointer.restore(
            folder, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args))


def _files(folder: pathlib.Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def _checksums(folder: pathlib.Path, names: Iterable[str]) -> dict[str, int]:
    """CRC-32 of files. Of files and not of leaves: a process may hold but a part of a leaf."""
    found = {}
    for name in names:
        checksum = 0
        with open(folder / name, "rb") as file:
            while piece := file.read(_READ_BYTES):
                checksum = zlib.crc32(piece, checksum)
        found[name] = checksum
    return found


def _check_files(folder: pathlib.Path, saved: Mapping[str, int]) -> None:
    """Holds files to their checksums; every process reads a part of them, and all come to one end."""
    mine = hosts.share(sorted(saved))
    problems = []
    for name in mine:
        try:
            if _checksums(folder / "state", [name])[name] != saved[name]:
                problems.append(f"state/{name} does not have the checksum that it was written with")
        except OSError as error:
            problems.append(f"state/{name} cannot be read ({error})")
    if listed := [problem for part in hosts.gather(problems) for problem in part]:
        raise CheckpointError(_damaged(folder, "; ".join(listed[:_MAX_LISTED])))


def _damaged(folder: pathlib.Path, how: str) -> str:
    return (
        f"the checkpoint {folder} is damaged: {how}. Remove that folder to continue from the "
        "checkpoint before it."
    )


def _check_leaves(
    folder: pathlib.Path, saved: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """All differences of names, shapes and types at once."""
    problems = [f"{name} is not in the checkpoint" for name in expected if name not in saved]
    problems += [f"{name} is only in the checkpoint" for name in saved if name not in expected]
    for name, leaf in expected.items():
        if name not in saved:
            continue
        there = f"{saved[name]['dtype']}{saved[name]['shape']}"
        here = f"{leaf.dtype}{list(leaf.shape)}"
        if there != here:
            problems.append(f"{name} is {there} in the checkpoint, expected {here}")
    if problems:
        rest = len(problems) - _MAX_LISTED
        listed = "; ".join(problems[:_MAX_LISTED]) + (f"; and {rest} more" if rest > 0 else "")
        raise CheckpointError(
            f"the checkpoint {folder} is of another model or optimizer: {listed}. Use the config "
            "that it was saved with, or another workdir."
        )


def _check_jsonable(value: Any, path: str) -> None:
    """JSON would quietly turn the key 1 into "1"; a resumed run would then miss it."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{path} has the key {key!r}, expected a string")
            _check_jsonable(child, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            _check_jsonable(child, f"{path}[{index}]")
    elif not (value is None or type(value) in (bool, int, float, str)):
        raise TypeError(f"{path} is {type(value).__name__}, expected a JSON value")


def _read_record(folder: pathlib.Path) -> dict[str, Any]:
    try:
        text = (folder / "checkpoint.json").read_text(encoding="utf-8")
        record = {"files": {}} | json.loads(text)  # earlier versions wrote no checksums
        version = record["format_version"]
        _check_record(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'checkpoint.json'} is missing or damaged ({error}). Remove the folder "
            f"{folder} to continue from the checkpoint before it."
        ) from error
    if version != FORMAT_VERSION:
        age = "a newer" if version > FORMAT_VERSION else "an older"
        raise CheckpointError(
            f"the checkpoint {folder} has format version {version}, written by {age} jaxagentrl; "
            f"this one reads version {FORMAT_VERSION}. Continue the run with the jaxagentrl it was "
            "started with, or use another workdir. The checkpoint has not been touched."
        )
    return record


def _check_record(record: Mapping[str, Any]) -> None:
    """What this version reads of a record of its own format; ValueError names what is not there."""
    if type(record["format_version"]) is not int:
        raise ValueError(f"format_version is {record['format_version']!r}")
    if record["format_version"] != FORMAT_VERSION:
        return
    for key, kind in {"step": int, "leaves": dict, "host": dict, "files": dict}.items():
        if not isinstance(record.get(key), kind):
            raise ValueError(f"{key} is {record.get(key)!r}")
    for name, entry in record["leaves"].items():
        if not (isinstance(entry, dict) and {"shape", "dtype"} <= entry.keys()):
            raise ValueError(f"leaves has {entry!r} for {name}")


def _complete(directory: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """(number, folder) of complete checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    matches = [(_FOLDER.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _remove(folder: pathlib.Path) -> None:
    """Deletes a checkpoint; renamed first, so that a kill leaves no half one that looks whole."""
    trash = folder.with_name(f".removing-{folder.name}")
    os.rename(folder, trash)
    shutil.rmtree(trash)


def remove_leftovers(directory: pathlib.Path) -> None:
    """Deletes what a kill has left of checkpoints that were being written or deleted."""
    for pattern in (".saving-*", ".removing-*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path)
