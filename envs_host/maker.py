"""The making of games in worker processes: build, play through, move into the cache."""

import errno
import hashlib
import importlib
import json
import os
import tempfile
from multiprocessing.connection import Connection
from typing import Any

from envs_host import arrival
from envs_host.registry import ENVIRONMENTS
from envs_host.specs import SetAside, Spec
from envs_host.types import GameFileError


def work(connection: Connection, cache_dir: str, scratch: str) -> None:
    """Makes the games whose specs come through the connection, until it ends."""
    # Inform keeps a folder in HOME, and TextWorld looks for `textworld_data` where it runs.
    os.environ.setdefault("GIT_CONFIG_GLOBAL", os.path.expanduser("~/.gitconfig"))
    os.environ["HOME"] = scratch
    os.chdir(scratch)
    tempfile.tempdir = scratch
    makers: dict[str, Any] = {}
    connection.send(None)
    while True:
        try:
            spec = connection.recv()
        except EOFError:
            return
        if spec.env not in makers:
            makers[spec.env] = importlib.import_module(ENVIRONMENTS[spec.env].maker)
            makers[spec.env].prepare()
        complaint = None
        with tempfile.TemporaryDirectory() as folder:
            try:
                _make(makers[spec.env].build, spec, cache_dir, folder)
            except (AssertionError, ValueError, GameFileError) as error:
                # How TextWorld rejects parameters, e.g. more ingredients to take than in a recipe, and what
                # repositories are read with.
                complaint = str(error) or repr(error)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT):
                    raise
                complaint = f"what was made cannot be written to env.cache_dir = {cache_dir} ({error.strerror})"
        connection.send(complaint)


def _make(build: Any, spec: Spec, cache_dir: str, folder: str) -> None:
    """Makes one game in `folder` and moves it into the cache, record last."""
    paths = spec.paths(cache_dir)
    built = [os.path.join(folder, "game" + path.partition(spec.key)[2]) for path in paths]
    record: dict[str, Any] = {"set_aside": None, "task": None, "sidecar_digest": None}
    try:
        task = build(spec, built[0], built[1])
    except SetAside as reason:
        record["set_aside"] = str(reason)
    else:
        with open(built[1], "rb") as sidecar:
            record["sidecar_digest"] = hashlib.sha256(sidecar.read()).hexdigest()
        record["task"] = task.to_json() | {"file": os.path.basename(paths[0])}
    with open(built[2], "w") as record_file:
        json.dump(record, record_file)
    for source, destination in zip(built, paths):
        if os.path.exists(source) and (record["task"] is not None or source == built[2]):
            arrival.move(source, destination)
