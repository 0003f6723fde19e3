"""Decoders in and out of Hugging Face folders, by an explicit table of tensor names (`tensor_table`).

Which settings are understood: `pretrained_config`.

One tensor at a time goes from the file to its place on the device or devices, and back: beyond the
parameters themselves the host holds one tensor.
"""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxagentrl import workdir
from jaxagentrl.models import (
    decoder,
    pretrained_config,
    sharding,
    tensor_files,
    tensor_table,
    tokenizer_files,
    weights_out,
)
from jaxagentrl.models.pretrained_config import PretrainedError

Params = dict[str, Any]

_GENERATION = "generation_config.json"

_MAX_STRANGERS = 8

# Rows of a vocabulary that are compared at a time.
_COMPARED_ROWS = 1024

_CARD = "README.md"

# Files that `save` may find in its target and replace; anything else is someone else's.
_OUR_FILES = {
    pretrained_config.FILE, _GENERATION, tensor_files.SINGLE, tensor_files.INDEX, "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "additional_chat_templates", "tokenizer.model", _CARD,
}

# A Gemma 3 with images keeps its language model under a prefix (of older and newer files), beside
# parts that text does not need.
_TEXT_PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.",
                  "language_model.lm_head.": "lm_head."}
_IMAGE_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.",
                   "model.multi_modal_projector.")


def load(
    directory: str | os.PathLike,
    *,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[decoder.DecoderConfig, Params]:
    """Reads a Hugging Face folder.

    Args:
        directory: holds config.json and model.safetensors or its shards with their index.
        dtype: "float32", "bfloat16" or "float16", of the parameters returned, whatever the file holds.
        mesh: places every parameter by the rules of `sharding`; None on the default device.

    Returns:
        (config, params), `params` in the structure of `decoder.init`.

    Raises:
        PretrainedError: no such folder, an unsupported architecture, setting or dtype, or tensors
            that are missing, surplus or misshapen (all of them listed, one per line).
    """
    _check_dtype(dtype)
    directory = pathlib.Path(directory).expanduser()
    config = pretrained_config.read_config(directory)
    stored = _locate_tensors(directory)
    _check_tensors(directory, config, stored)
    table = tensor_table.of(config)
    # All tensors are read into the same memory: jax lets go of what it was given some moments after
    # its last use, so that of arrays of their own two would be in memory, on a busy machine always.
    names = [name for entry in table for name in entry.tensors(config)]
    buffer = np.empty(max(stored[name].num_bytes for name in names), np.uint8)
    params: Params = {}
    for entry in table:
        leaf = _read_leaf(entry, config, stored, buffer, jnp.dtype(dtype), mesh)
        _set(params, entry.path, leaf)
    return config, params


def save(
    directory: str | os.PathLike,
    config: decoder.DecoderConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    stop_ids: Sequence[int] = (),
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    The folder is written beside its place and moved there when complete; an earlier export in the
    same place is replaced, but for its README.md.

    Args:
        directory: where to write.
        config: the decoder's shape.
        params: its parameters, exactly the tree of `decoder.init` (no value head).
        tokenizer: a transformers tokenizer to save along, with its chat template; its padding and
            beginning-of-sequence ids go into generation_config.json.
        stop_ids: ids that end a turn, in the order in which they are written; the tokenizer's end of
            sequence follows if it is not among them. Generation stops at all of them.
        dtype: "float32", "bfloat16" or "float16" of the files; None keeps that of the parameters, which
            is then to be one.
        max_shard_bytes: files are split before they grow larger.

    Raises:
        PretrainedError: `params` is not of this config, an unsupported dtype, or `directory` holds
            other files.
    """
    directory = pathlib.Path(directory).expanduser().absolute()
    _check_params(config, params, needs_one_dtype=dtype is None)
    _check_dtype(dtype or params["embed"]["embedding"].dtype.name)
    _refuse_foreign_files(directory)
    special = _special_ids(tokenizer, stop_ids)
    stored = jnp.dtype(dtype or params["embed"]["embedding"].dtype)
    settings = pretrained_config.to_json(config, stored.name)
    with workdir.replacing_folder(directory, keeping=[_CARD]) as folder:
        sharding.outside(weights_out.write, folder, config, params, stored, max_shard_bytes)
        pretrained_config.write_object(folder / pretrained_config.FILE, settings | special)
        pretrained_config.write_object(folder / _GENERATION, {"do_sample": False, **special})
        if tokenizer is not None:
            tokenizer_files.write(folder, tokenizer)


def _check_dtype(dtype: str) -> None:
    if dtype not in tensor_files.WEIGHT_DTYPES:
        raise PretrainedError(
            f"dtype is {dtype!r}, expected one of {', '.join(tensor_files.WEIGHT_DTYPES)}: weights are not quantized here."
        )


def stop_ids(directory: str | os.PathLike) -> tuple[int, ...]:
    """The ids at which the publisher ends generation, in the order of the file.

    From generation_config.json, else from config.json; () where neither says.

    Raises:
        PretrainedError: no config.json, or something that is no id.
    """
    directory = pathlib.Path(directory).expanduser()
    config = pretrained_config.read_object(directory / pretrained_config.FILE)
    sources = [(pretrained_config.FILE, config)]
    if isinstance(config.get("text_config"), dict):   # a model with images
        sources.append((f"{pretrained_config.FILE}: text_config", config["text_config"]))
    if (directory / _GENERATION).exists():
        sources.insert(0, (_GENERATION, pretrained_config.read_object(directory / _GENERATION)))
    for name, settings in sources:
        said = settings.get("eos_token_id")
        if said is None:
            continue
        ids = said if isinstance(said, list) else [said]
        if any(type(id) is not int or id < 0 for id in ids):
            raise PretrainedError(
                f"{directory / name}: eos_token_id is {said!r}, expected an id or a list of ids."
            )
        return tuple(dict.fromkeys(ids))
    return ()


def _special_ids(tokenizer: Any, stop_ids: Sequence[int]) -> dict[str, Any]:
    ends = list(dict.fromkeys(map(int, stop_ids)))
    special = {}
    if tokenizer is not None:
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
            ends.append(tokenizer.eos_token_id)
        special = {
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        }
    if not ends:
        return special
    return special | {"eos_token_id": ends if len(ends) > 1 else ends[0]}


def _locate_tensors(directory: pathlib.Path) -> dict[str, tensor_files.StoredTensor]:
    """Tensor name → where it is, from the headers of a single file or of the shards."""
    single, index_file = directory / tensor_files.SINGLE, directory / tensor_files.INDEX
    if index_file.exists():
        weight_map = pretrained_config.read_object(index_file).get("weight_map")
        if not isinstance(weight_map, dict):
            raise PretrainedError(f"{index_file} has no 'weight_map'. Export the model again.")
        shards = {file: tensor_files.contents(directory / file)
                  for file in sorted(set(weight_map.values()))}
        elsewhere = [f"{name} is not in {file}, where the index says it is"
                     for name, file in weight_map.items() if name not in shards[file]]
        if elsewhere:
            raise PretrainedError(
                f"{directory} is not what its index says; download the model again: "
                f"{_lines(elsewhere)}"
            )
        found = {name: shards[file][name] for name, file in weight_map.items()}
    elif single.exists():
        found = tensor_files.contents(single)
    else:
        raise PretrainedError(
            f"{directory} holds neither {tensor_files.SINGLE} nor {tensor_files.INDEX}. Models stored as .bin or .gguf "
            "must be converted with transformers (save_pretrained) first."
        )
    if not any(name.startswith(_IMAGE_PREFIXES) for name in found):
        return found
    return {_text_name(name): tensor for name, tensor in found.items()
            if not name.startswith(_IMAGE_PREFIXES)}


def _text_name(name: str) -> str:
    for prefix, ours in _TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return name


def _check_tensors(
    directory: pathlib.Path,
    config: decoder.DecoderConfig,
    stored: Mapping[str, tensor_files.StoredTensor],
) -> None:
    """All missing, surplus and misshapen tensors at once, from the headers alone."""
    expected = {name: entry.shape for entry in tensor_table.of(config) for name in entry.tensors(config)}
    problems = [f"{name} is missing" for name in expected if name not in stored]
    for name, tensor in stored.items():
        if name not in expected:
            if not _is_redundant(name, config, stored):
                problems.append(f"{name} is surplus")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} has shape {tensor.shape}, expected {expected[name]}")
    if problems:
        raise PretrainedError(
            f"{directory} does not hold the model that its {pretrained_config.FILE} describes: "
            f"{_lines(problems)}"
        )


def _is_redundant(
    name: str, config: decoder.DecoderConfig, stored: Mapping[str, tensor_files.StoredTensor]
) -> bool:
    """Rotary tables of old exports, and an output matrix that is the tied embedding once more."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    source = "model.embed_tokens.weight"
    if name != "lm_head.weight" or not config.tie_embeddings or source not in stored:
        return False
    return _holds_the_same(stored[name], stored[source])


def _holds_the_same(one: tensor_files.StoredTensor, other: tensor_files.StoredTensor) -> bool:
    """Compared in stretches of rows: whole, two of the largest tensors would be in memory."""
    if one.shape != other.shape:
        return False
    starts = range(0, one.shape[0], _COMPARED_ROWS)
    stretches = (slice(start, start + _COMPARED_ROWS) for start in starts)
    return all(np.array_equal(one.read(rows), other.read(rows)) for rows in stretches)


def _read_leaf(
    entry: tensor_table.Entry,
    config: decoder.DecoderConfig,
    stored: Mapping[str, tensor_files.StoredTensor],
    buffer: np.ndarray,
    dtype: np.dtype,
    mesh: jax.sharding.Mesh | None,
) -> jax.Array:
    """One leaf in its place on the devices; the host holds one tensor of it at a time, in `buffer`."""
    shape = entry.leaf_shape(config)
    where = None if mesh is None else _sharding(entry, shape, mesh)
    leaf = None
    if entry.per_layer:
        leaf = jnp.zeros(shape, dtype, device=where)
    for layer, name in enumerate(entry.tensors(config)):
        tensor = _put(stored[name].read(into=buffer), entry, where)
        if entry.per_layer:
            leaf = _insert(leaf, tensor, layer, transposed=entry.transposed, where=where)
        else:
            leaf = _convert(tensor, dtype=dtype, transposed=entry.transposed, where=where)
        leaf.block_until_ready()   # else the next tensor is read over this one while it is in use
    return leaf


def _sharding(
    entry: tensor_table.Entry, shape: tuple[int, ...], mesh: jax.sharding.Mesh
) -> jax.sharding.NamedSharding:
    axes = sharding.axes_of("/".join(entry.path), len(shape))
    return jax.sharding.NamedSharding(mesh, sharding.spec(axes, shape, mesh.shape))


def _put(
    tensor: np.ndarray, entry: tensor_table.Entry, where: jax.sharding.NamedSharding | None
) -> jax.Array:
    """A tensor on the devices as it is in the file, split as its leaf is going to be."""
    if where is None:
        return jax.device_put(tensor)
    ndim = tensor.ndim + entry.per_layer
    axes = (*where.spec, *[None] * ndim)[:ndim][1 if entry.per_layer else 0:]
    spec = jax.sharding.PartitionSpec(*(axes[::-1] if entry.transposed else axes))
    where = jax.sharding.NamedSharding(where.mesh, spec)
    return jax.make_array_from_callback(tensor.shape, where, lambda index: tensor[index])


@functools.partial(jax.jit, static_argnames=("transposed", "where"), donate_argnames="leaf")
def _insert(leaf: jax.Array, tensor: jax.Array, layer: int, *, transposed: bool, where: Any):
    tensor = (tensor.T if transposed else tensor).astype(leaf.dtype)
    leaf = jax.lax.dynamic_update_index_in_dim(leaf, tensor, layer, 0)
    return leaf if where is None else jax.lax.with_sharding_constraint(leaf, where)


@functools.partial(jax.jit, static_argnames=("dtype", "transposed", "where"))
def _convert(tensor: jax.Array, *, dtype: np.dtype, transposed: bool, where: Any):
    # A copy even where nothing changes: the tensor may be the memory that the next one is read into.
    leaf = jnp.copy(tensor.T if transposed else tensor).astype(dtype)
    return leaf if where is None else jax.lax.with_sharding_constraint(leaf, where)


def _check_params(
    config: decoder.DecoderConfig, params: Params, *, needs_one_dtype: bool
) -> None:
    """All leaves that are missing, surplus, misshapen or of differing dtypes at once."""
    expected = {"/".join(entry.path): entry.leaf_shape(config) for entry in tensor_table.of(config)}
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
    if needs_one_dtype and len(dtypes) > 1:
        problems.append(f"leaves have several dtypes {dtypes}, expected one, or a dtype to write")
    if problems:
        raise PretrainedError(f"the parameters do not fit the config: {_lines(problems)}")


def _refuse_foreign_files(directory: pathlib.Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise PretrainedError(f"{directory} is a file. Give a new or empty folder.")
    strangers = sorted(
        path.name for path in directory.iterdir()
        if path.name not in _OUR_FILES and not path.match("model-*-of-*.safetensors")
    )
    if strangers:
        shown = ", ".join(strangers[:_MAX_STRANGERS])
        rest = len(strangers) - _MAX_STRANGERS
        raise PretrainedError(
            f"{directory} holds files that are no model export ({shown}"
            f"{f' and {rest} more' if rest > 0 else ''}); saving would delete them. Give a new or "
            "empty folder."
        )


def _lines(problems: Sequence[str]) -> str:
    """All of them: which tensors differ often shows by what pattern they do."""
    return "".join(f"\n  {problem}" for problem in problems)


def _set(params: Params, path: tuple[str, ...], leaf: Any) -> None:
    for name in path[:-1]:
        params = params.setdefault(name, {})
    params[path[-1]] = leaf
