"""Decoders in and out of Hugging Face folders, by an explicit table of tensor names.

PyTorch stores a projection as [out, in] and one tensor per layer; our trees hold [in, out] and all
layers in one leaf with a leading layer axis. Which settings are understood: `pretrained_config`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from jaxagentrl import workdir
from jaxagentrl.models import decoder, pretrained_config
from jaxagentrl.models.pretrained_config import PretrainedError, listed

Params = dict[str, Any]

_GENERATION = "generation_config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# Files that `save` may find in its target and replace; anything else is someone else's.
_OUR_FILES = {
    pretrained_config.FILE, _GENERATION, _SINGLE, _INDEX, "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
}


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One leaf of our tree and the tensor or tensors of theirs that it is made of."""

    path: tuple[str, ...]
    tensor: str                  # with "{layer}" when there is one per layer
    shape: tuple[int, ...]       # of one tensor, as stored in the file
    transposed: bool

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.tensor

    def leaf_shape(self, config: decoder.DecoderConfig) -> tuple[int, ...]:
        shape = self.shape[::-1] if self.transposed else self.shape
        return (config.num_layers, *shape) if self.per_layer else shape

    def tensors(self, config: decoder.DecoderConfig) -> list[str]:
        if not self.per_layer:
            return [self.tensor]
        return [self.tensor.format(layer=layer) for layer in range(config.num_layers)]


def load(
    directory: str | os.PathLike,
    *,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[decoder.DecoderConfig, Params]:
    """Reads a Hugging Face folder.

    Args:
        directory: holds config.json and model.safetensors or its shards with their index.
        dtype: of the parameters returned, whatever the file holds.
        mesh: places every parameter whole on each device of the mesh; None on the default device.

    Returns:
        (config, params), `params` in the structure of `decoder.init`.

    Raises:
        PretrainedError: no such folder, an unsupported architecture or setting, or tensors that
            are missing, surplus or misshapen (all of them listed).
    """
    directory = pathlib.Path(directory)
    config = pretrained_config.read_config(directory)
    locations = _locate_tensors(directory)
    with _OpenFiles() as files:
        _check_tensors(directory, config, locations, files)
        params: Params = {}
        for entry in _table(config):
            leaf = _read_leaf(entry, config, locations, files, jax.numpy.dtype(dtype))
            _set(params, entry.path, _place(leaf, mesh))
    return config, params


def save(
    directory: str | os.PathLike,
    config: decoder.DecoderConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    The folder is written beside its place and moved there when complete; an earlier export in the
    same place is replaced.

    Args:
        directory: where to write.
        config: the decoder's shape.
        params: its parameters, exactly the tree of `decoder.init` (no value head); stored in the
            dtype they have.
        tokenizer: a transformers tokenizer to save along; its end-of-sequence and padding ids go
            into generation_config.json.
        max_shard_bytes: files are split before they grow larger.

    Raises:
        PretrainedError: `params` is not of this config, or `directory` holds other files.
    """
    directory = pathlib.Path(directory).absolute()
    _check_params(config, params)
    _refuse_foreign_files(directory)
    special = {} if tokenizer is None else {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    settings = pretrained_config.to_json(config, str(params["embed"]["embedding"].dtype))
    with workdir.replacing_folder(directory) as folder:
        _write_weights(folder, config, params, max_shard_bytes)
        pretrained_config.write_object(folder / pretrained_config.FILE, settings | special)
        pretrained_config.write_object(folder / _GENERATION, {"do_sample": False, **special})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _table(config: decoder.DecoderConfig) -> list[_Entry]:
    """Every parameter of the decoder, in the order of the forward pass."""
    width, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    layer = "model.layers.{layer}"
    entries = [
        _Entry(("embed", "embedding"), "model.embed_tokens.weight", (vocab, width), False),
        _Entry(("layers", "attention_norm", "scale"), f"{layer}.input_layernorm.weight",
               (width,), False),
    ]
    for name, size in (("q", queries), ("k", keys), ("v", keys)):
        path, tensor = ("layers", "attention", name), f"{layer}.self_attn.{name}_proj"
        entries.append(_Entry((*path, "kernel"), f"{tensor}.weight", (size, width), True))
        if config.attention_bias:
            entries.append(_Entry((*path, "bias"), f"{tensor}.bias", (size,), False))
    entries += [
        _Entry(("layers", "attention", "o", "kernel"), f"{layer}.self_attn.o_proj.weight",
               (width, queries), True),
        _Entry(("layers", "mlp_norm", "scale"), f"{layer}.post_attention_layernorm.weight",
               (width,), False),
    ]
    for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
        entries.append(_Entry(("layers", "mlp", name, "kernel"), f"{layer}.mlp.{name}_proj.weight",
                              shape, True))
    entries.append(_Entry(("final_norm", "scale"), "model.norm.weight", (width,), False))
    if not config.tie_embeddings:
        entries.append(_Entry(("lm_head", "kernel"), "lm_head.weight", (vocab, width), True))
    return entries


class _OpenFiles:
    """Safetensors files, opened once each; tensors are read from disk only when asked for."""

    def __init__(self):
        self._files: dict[pathlib.Path, Any] = {}

    def __enter__(self) -> "_OpenFiles":
        return self

    def __exit__(self, *unused) -> None:
        self._files.clear()   # the memory map goes with its last reference

    def get(self, path: pathlib.Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safetensors.safe_open(path, framework="numpy")
            except (OSError, safetensors.SafetensorError) as error:
                raise PretrainedError(
                    f"{path} cannot be read: {error}. Download or export the model again."
                ) from error
        return self._files[path]


def _locate_tensors(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Tensor name → file, from the index of a sharded model or the header of a single file."""
    if (directory / _INDEX).exists():
        index = pretrained_config.read_object(directory / _INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise PretrainedError(
                f"{directory / _INDEX} has no 'weight_map'. Export the model again.")
        return {name: directory / file for name, file in index["weight_map"].items()}
    path = directory / _SINGLE
    if not path.exists():
        raise PretrainedError(
            f"{directory} holds neither {_SINGLE} nor {_INDEX}. Models stored as .bin or .gguf "
            "must be converted with transformers (save_pretrained) first."
        )
    with _OpenFiles() as files:
        return {name: path for name in files.get(path).keys()}


def _check_tensors(
    directory: pathlib.Path,
    config: decoder.DecoderConfig,
    locations: Mapping[str, pathlib.Path],
    files: _OpenFiles,
) -> None:
    """All missing, surplus and misshapen tensors at once, from the headers alone."""
    expected = {
        name: entry.shape for entry in _table(config) for name in entry.tensors(config)
    }
    problems = [f"{name} is missing" for name in expected if name not in locations]
    for name, path in locations.items():
        file = files.get(path)
        if name not in file.keys():
            problems.append(f"{name} is not in {path.name}, where the index says it is")
        elif name in expected:
            shape = tuple(file.get_slice(name).get_shape())
            if shape != expected[name]:
                problems.append(f"{name} has shape {shape}, expected {expected[name]}")
        elif not _is_redundant(name, config, locations, files):
            problems.append(f"{name} is surplus")
    if problems:
        raise PretrainedError(
            f"{directory} does not hold the model that its {pretrained_config.FILE} describes: "
            f"{listed(problems)}."
        )


def _is_redundant(
    name: str,
    config: decoder.DecoderConfig,
    locations: Mapping[str, pathlib.Path],
    files: _OpenFiles,
) -> bool:
    """Rotary tables of old exports, and an output matrix that is the tied embedding once more."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    source = "model.embed_tokens.weight"
    if name != "lm_head.weight" or not config.tie_embeddings or source not in locations:
        return False
    return np.array_equal(
        files.get(locations[name]).get_tensor(name),
        files.get(locations[source]).get_tensor(source),
    )


def _read_leaf(
    entry: _Entry,
    config: decoder.DecoderConfig,
    locations: Mapping[str, pathlib.Path],
    files: _OpenFiles,
    dtype: np.dtype,
) -> np.ndarray:
    """One leaf on the host; at most this leaf and one tensor are in memory besides the result."""
    leaf = np.empty(entry.leaf_shape(config), dtype)
    for layer, name in enumerate(entry.tensors(config)):
        tensor = files.get(locations[name]).get_tensor(name)
        target = leaf[layer] if entry.per_layer else leaf
        target[...] = tensor.T if entry.transposed else tensor
    return leaf


def _place(leaf: np.ndarray, mesh: jax.sharding.Mesh | None) -> jax.Array:
    if mesh is None:
        return jax.device_put(leaf)
    return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def _check_params(config: decoder.DecoderConfig, params: Params) -> None:
    """All leaves that are missing, surplus, misshapen or of differing dtypes at once."""
    expected = {"/".join(entry.path): entry.leaf_shape(config) for entry in _table(config)}
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    problems = [f"{name} is missing" for name in expected if name not in leaves]
    problems += [f"{name} is surplus" for name in leaves if name not in expected]
    problems += [
        f"{name} has shape {leaves[name].shape}, expected {shape}"
        for name, shape in expected.items() if name in leaves and leaves[name].shape != shape
    ]
    dtypes = sorted({str(leaf.dtype) for leaf in leaves.values()})
    if len(dtypes) > 1:
        problems.append(f"leaves have several dtypes {dtypes}, expected one")
    if problems:
        raise PretrainedError(f"the parameters do not fit the config: {listed(problems)}.")


def _refuse_foreign_files(directory: pathlib.Path) -> None:
    if not directory.exists():
        return
    strangers = sorted(
        path.name for path in directory.iterdir()
        if path.name not in _OUR_FILES and not path.match("model-*-of-*.safetensors")
    )
    if strangers:
        raise PretrainedError(
            f"{directory} holds files that are no model export ({listed(strangers)}); saving would "
            "delete them. Give a new or empty folder."
        )


def _write_weights(
    folder: pathlib.Path, config: decoder.DecoderConfig, params: Params, max_shard_bytes: int
) -> None:
    """One file, or numbered shards with their index; at most one shard is in memory on the host."""
    metadata = {"format": "pt"}   # transformers refuses files without it
    shards = _plan_shards(config, params, max_shard_bytes)
    if len(shards) == 1:
        tensors = {name: _tensor(entry, layer, params) for name, entry, layer in shards[0]}
        safetensors.numpy.save_file(tensors, folder / _SINGLE, metadata=metadata)
        return
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _tensor(entry, layer, params) for name, entry, layer in shard}
        safetensors.numpy.save_file(tensors, folder / file, metadata=metadata)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    pretrained_config.write_object(folder / _INDEX, index)


def _plan_shards(
    config: decoder.DecoderConfig, params: Params, max_shard_bytes: int
) -> list[list[tuple[str, _Entry, int]]]:
    shards: list[list[tuple[str, _Entry, int]]] = [[]]
    size = 0
    for name, entry, layer in _all_tensors(config):
        num_bytes = int(np.prod(entry.shape)) * _get(params, entry.path).dtype.itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, entry, layer))
        size += num_bytes
    return shards


def _all_tensors(config: decoder.DecoderConfig) -> Iterator[tuple[str, _Entry, int]]:
    """(name, entry, layer) layer by layer, as the files of transformers are laid out."""
    table = _table(config)
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


def _tensor(entry: _Entry, layer: int, params: Params) -> np.ndarray:
    leaf = _get(params, entry.path)
    tensor = np.asarray(jax.device_get(leaf[layer] if entry.per_layer else leaf))
    return np.ascontiguousarray(tensor.T if entry.transposed else tensor)


def _get(params: Params, path: tuple[str, ...]) -> Any:
    for name in path:
        params = params[name]
    return params


def _set(params: Params, path: tuple[str, ...], leaf: Any) -> None:
    for name in path[:-1]:
        params = params.setdefault(name, {})
    params[path[-1]] = leaf
