"""A decoder's parameters into safetensors files, as transformers names and lays them out; the host holds one tensor."""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxagentrl.models import decoder, pretrained_config, tensor_files, tensor_table
from jaxagentrl.models.pretrained_config import PretrainedError

Params = dict[str, Any]

# Of a tensor that is written, what is fetched from the devices at a time.
_STRETCH_BYTES = 4 << 20


def write(
    folder: pathlib.Path,
    config: decoder.DecoderConfig,
    params: Params,
    dtype: np.dtype,
    max_shard_bytes: int,
) -> None:
    """One file, or numbered shards with their index; the host holds one tensor at a time."""
    shards = _plan_shards(config, dtype, max_shard_bytes)
    files = [tensor_files.SINGLE]
    if len(shards) > 1:
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                 for number in range(1, len(shards) + 1)]
        specs = [(spec, file) for file, shard in zip(files, shards, strict=True)
                 for spec, _, _ in shard]
        pretrained_config.write_object(folder / tensor_files.INDEX, {
            "metadata": {"total_size": sum(spec.num_bytes for spec, _ in specs)},
            "weight_map": {spec.name: file for spec, file in specs},
        })
    for file, shard in zip(files, shards, strict=True):
        tensor_files.write(
            folder / file,
            [spec for spec, _, _ in shard],
            (_tensor(entry, layer, params, dtype) for _, entry, layer in shard),
        )


def _plan_shards(
    config: decoder.DecoderConfig, dtype: np.dtype, max_shard_bytes: int
) -> list[list[tuple[tensor_files.Spec, tensor_table.Entry, int]]]:
    shards: list[list[tuple[tensor_files.Spec, tensor_table.Entry, int]]] = [[]]
    size = 0
    for name, entry, layer in _all_tensors(config):
        spec = tensor_files.Spec(name, dtype, entry.shape)
        if shards[-1] and size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((spec, entry, layer))
        size += spec.num_bytes
    return shards


def _all_tensors(config: decoder.DecoderConfig) -> Iterator[tuple[str, tensor_table.Entry, int]]:
    """(name, entry, layer) layer by layer, as the files of transformers are laid out."""
    table = tensor_table.of(config)
    for entry in table:
        if not entry.per_layer and entry.path[0] == "embed":
            yield entry.tensor, entry, 0
    for layer in range(config.num_layers):
        for entry in table:
            if entry.per_layer:
                yield entry.tensor.format(layer=layer), entry, layer
    for entry in table:
        if not entry.per_layer and entry.path[0] != "embed":
            yield entry.tensor, entry, 0


def _tensor(entry: tensor_table.Entry, layer: int, params: Params, dtype: np.dtype) -> np.ndarray:
    """A tensor as its file has it, fetched from every device in stretches.

    Whole, the leaf's own layout and dtype would be in memory beside the file's, and an array that is asked for whole
    keeps its copy on the host for as long as it lives. A stretch of a leaf that is split over devices would be gathered
    on all of them for each.
    """
    tensor = np.empty(entry.shape, dtype)
    for index, part in _parts(_get(params, entry.path)).items():
        if entry.per_layer:
            first = index[0][0]
            if not first <= layer < first + part.shape[0]:
                continue
            index, part = index[1:], part[layer - first]
        axis = part.ndim - 1 if entry.transposed else 0   # the file's rows
        count = max(1, _STRETCH_BYTES * part.shape[axis] // part.nbytes)
        where = [slice(*ends) for ends in (index[::-1] if entry.transposed else index)]
        begin = where[0].start
        for start in range(0, part.shape[axis], count):
            rows = min(count, part.shape[axis] - start)
            where[0] = slice(begin + start, begin + start + rows)
            tensor[tuple(where)] = _stretch(part, start, rows, transposed=entry.transposed)
    return tensor


def _parts(leaf: jax.Array | np.ndarray) -> dict[tuple[tuple[int, int], ...], jax.Array | np.ndarray]:
    """What devices hold of a leaf, each part once, by the first and last of its indices in every dimension.

    Raises:
        PretrainedError: some of it is in other processes.
    """
    if isinstance(leaf, np.ndarray):
        return {tuple((0, size) for size in leaf.shape): leaf}
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        raise PretrainedError("the parameters lie on devices of several processes: see `sharding.to_first`.")
    return {
        tuple(ends.indices(size)[:2] for ends, size in zip(shard.index, leaf.shape, strict=True)): shard.data
        for shard in leaf.addressable_shards
    }


def _stretch(
    part: jax.Array | np.ndarray, start: int, rows: int, *, transposed: bool
) -> jax.Array | np.ndarray:
    """Some of the file's rows."""
    if isinstance(part, np.ndarray):
        return (part.T if transposed else part)[start:start + rows]
    return _stretch_on_device(part, start, rows=rows, transposed=transposed)


@functools.partial(jax.jit, static_argnames=("rows", "transposed"))
def _stretch_on_device(part: jax.Array, start: int, *, rows: int, transposed: bool) -> jax.Array:
    taken = jax.lax.dynamic_slice_in_dim(part, start, rows, part.ndim - 1 if transposed else 0)
    return taken.T if transposed else taken


def _get(params: Params, path: tuple[str, ...]) -> Any:
    for name in path:
        params = params[name]
    return params
