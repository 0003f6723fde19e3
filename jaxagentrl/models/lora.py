"""Low-rank adapters: W x + (α / r) B A x with W frozen (Hu et al. 2021, arXiv:2106.09685).

Adapters are a tree with the paths of the kernels they belong to and, instead of "kernel", the leaves
"lora_a" [N, in, r] and "lora_b" [N, r, out]. `attach` puts them beside the kernels, where the
decoder adds their product; `merge` adds it to the kernels once and for all. "lora_b" starts at zero,
so an untrained adapter changes nothing, and the frozen model is the reference at no cost.
"""

import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jaxagentrl import workdir
from jaxagentrl.models import pretrained_config

Params = dict[str, Any]

# Our path of a kernel within a layer → the module's name in `transformers` and PEFT.
MODULES = {
    **{f"attention/{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


class LoraError(ValueError):
    """Settings or adapters that do not fit the model."""


def targeted(targets: Sequence[str]) -> list[str]:
    """Paths of the kernels that are adapted, in the order of `MODULES`.

    Args:
        targets: regular expressions for the end of a path, such as "q", "attention/.*", "mlp/up".

    Raises:
        LoraError: a target that names nothing or is no regular expression, or a text instead of a list.
    """
    if isinstance(targets, str):
        raise LoraError(
            f"lora.targets is the text {targets!r}, expected a list of them: write ({targets!r},)."
        )
    endings = {target: _ending(target) for target in targets}
    for target, ending in endings.items():
        if not any(map(ending.search, MODULES)):
            raise LoraError(
                f"lora.targets has {target!r}, which names none of {', '.join(MODULES)}."
            )
    found = [path for path in MODULES if any(ending.search(path) for ending in endings.values())]
    if not found:
        raise LoraError(f"lora.targets is empty; name some of {', '.join(MODULES)}.")
    return found


def init(policy: Params, key: jax.Array, *, rank: int, targets: Sequence[str]) -> Params:
    """Adapters for a model: A uniform in ±1/√in, B zero, as PEFT draws them.

    Raises:
        LoraError: no such target, or a rank that is no saving.
    """
    adapters: Params = {"layers": {}}
    for number, path in enumerate(targeted(targets)):
        block, name = path.split("/")
        depth, size_in, size_out = policy["layers"][block][name]["kernel"].shape
        if not 0 < rank < min(size_in, size_out):
            raise LoraError(
                f"lora.rank is {rank}, expected 1 to {min(size_in, size_out) - 1}: {path} is "
                f"{size_in} x {size_out}."
            )
        limit = size_in**-0.5
        a = jax.random.uniform(
            jax.random.fold_in(key, number), (depth, size_in, rank), minval=-limit, maxval=limit
        )
        leaves = {"lora_a": a, "lora_b": jnp.zeros((depth, rank, size_out))}
        adapters["layers"].setdefault(block, {})[name] = leaves
    return adapters


def attach(policy: Params, adapters: Params, scale: float | jax.Array) -> Params:
    """The model with its adapters beside the kernels; `scale` is α / r. No kernel is copied."""
    layers = dict(policy["layers"])
    for block, projections in adapters["layers"].items():
        layers[block] = dict(layers[block])
        for name, leaves in projections.items():
            scaled = {"lora_a": leaves["lora_a"], "lora_b": leaves["lora_b"] * scale}
            layers[block][name] = layers[block][name] | scaled
    return policy | {"layers": layers}


def merge(
    policy: Params, adapters: Params, scale: float, *, dtype: str = "float32"
) -> Params:
    """The model with W + (α / r) A B for its kernels: a plain decoder tree.

    The merged kernels are numpy arrays: they are computed on the host, one layer at a time, so that
    no second model lies on a device.

    Args:
        dtype: of the merged kernels. They are summed in float32 and rounded to it once, whatever the
            model is in: what adapters add may be less than half of a bfloat16 weight's last bit. The
            other leaves stay as they are.
    """
    layers = dict(policy["layers"])
    for block, projections in adapters["layers"].items():
        layers[block] = dict(layers[block])
        for name, leaves in projections.items():
            kernel = layers[block][name]["kernel"]
            a, b = (np.asarray(leaves[leaf], np.float32) for leaf in ("lora_a", "lora_b"))
            merged = np.empty(kernel.shape, jnp.dtype(dtype))
            for layer in range(len(merged)):
                added = np.float32(scale) * (a[layer] @ b[layer])
                merged[layer] = np.asarray(kernel[layer], np.float32) + added
            layers[block][name] = layers[block][name] | {"kernel": merged}
    return policy | {"layers": layers}


def save(
    directory: str | os.PathLike, adapters: Params, *, alpha: float, base: str | None
) -> None:
    """Writes adapters alone, in the format that PEFT loads onto the base model.

    Args:
        directory: replaced, but for its README.md, if it exists and holds adapters, created otherwise.
        alpha: α; PEFT scales by alpha / rank.
        base: name or folder of the base model, for adapter_config.json, where a folder is absolute: it
            is looked for from wherever the adapters are loaded. Of a folder it is read where
            transformers has the layers: those of a Gemma 3 with images lie deeper.
    """
    base = _absolute_if_folder(base)
    layers = "model.layers" if base is None else pretrained_config.layers_module(base)
    tensors: dict[str, np.ndarray] = {}
    modules, rank = [], 0
    for block, projections in adapters["layers"].items():
        for name, leaves in projections.items():
            module = MODULES[f"{block}/{name}"]
            modules.append(module)
            for leaf, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                # Theirs are [out, in] of each of the two products.
                for layer, matrix in enumerate(np.asarray(jax.device_get(leaves[leaf]))):
                    key = f"base_model.model.{layers}.{layer}.{module}.{theirs}.weight"
                    tensors[key] = np.ascontiguousarray(matrix.T)
            rank = leaves["lora_a"].shape[-1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _target_modules(layers, sorted(set(modules))),
    }
    directory = pathlib.Path(directory).expanduser().absolute()
    with workdir.replacing_folder(directory, keeping=["README.md"]) as folder:
        safetensors.numpy.save_file(
            tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"}
        )
        workdir.write_atomic(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def _absolute_if_folder(base: str | None) -> str | None:
    if base is None:
        return None
    folder = pathlib.Path(base).expanduser()
    return str(folder.absolute()) if folder.is_dir() else base


def _target_modules(layers: str, modules: Sequence[str]) -> list[str] | str:
    """Last names of modules, or a regular expression where the image part has modules of that name."""
    if layers == "model.layers":
        return sorted({module.rsplit(".", 1)[1] for module in modules})
    ends = "|".join(re.escape(module) for module in modules)
    return rf".*{re.escape(layers)}\.\d+\.({ends})"


def _ending(target: str) -> re.Pattern[str]:
    """What finds the paths with an end that is the target, whole names of it."""
    try:
        re.compile(target)  # By itself: "q)|(o" would make sense within our brackets alone.
        return re.compile(rf"(^|/)(?:{target})$")
    except re.error as error:
        raise LoraError(
            f"lora.targets has {target!r}, which is no regular expression ({error}). Write names such as "
            "'q' or 'mlp/up', or patterns of them such as 'attention/(q|v)'."
        ) from error
