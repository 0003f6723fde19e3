"""The config.json of a Hugging Face model folder: what of it our decoder can be.

Both published spellings are read: rotations as `rope_theta` and `rope_scaling` or as
`rope_parameters` (one for all layers, or one per kind of layer), windows as `layer_types` or as the
older keys. A setting that would change the numbers and that the decoder does not implement is an
error naming its key, never ignored. Which families there are: `pretrained_families`.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxagentrl.models import decoder_config, git_lfs, rope
from jaxagentrl.models.pretrained_families import (
    BY_MODEL_TYPE,
    FAMILIES,
    NEUTRAL,
    OFF,
    SIZES,
    Family,
    differences,
)

FILE = "config.json"

# Written for models that say nothing of it: without the key transformers takes the family's default,
# which may be less than the model was trained with.
_UNSAID_LENGTH = 32_768

# With the sizes, the keys that every family reads.
_READ = {
    *SIZES, "num_key_value_heads", "head_dim", "rope_theta", "rope_parameters", "rope_scaling",
    "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "model_type", "layer_types",
}
_FULL, _LOCAL = "full_attention", "sliding_attention"

# Names of config.json and ours, for what our config says is wrong.
_NAMES = SIZES | {
    "num_key_value_heads": "num_kv_heads", "query_pre_attn_scalar": "query_scale_dim",
    "rms_norm_eps": "norm_eps",
}
_COUNTS = (
    *SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", "sliding_window_pattern",
)
_NUMBERS = (
    "rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "max_window_layers",
    "attn_logit_softcapping", "final_logit_softcapping",
)


class PretrainedError(ValueError):
    """A model folder cannot be read or written; the message names the file and the way out."""


def read_config(directory: str | os.PathLike) -> decoder_config.DecoderConfig:
    """The decoder that a folder's config.json describes.

    Raises:
        PretrainedError: see `pretrained.load`.
    """
    path = pathlib.Path(directory).expanduser() / FILE
    settings = _text_settings(read_object(path))
    family = BY_MODEL_TYPE.get(str(settings.get("model_type")))
    if family is None:
        raise PretrainedError(
            f"{path}: model_type is {settings.get('model_type')!r}, expected one of "
            f"{sorted(BY_MODEL_TYPE)}. Use a model of these families."
        )
    problems = _unsupported_settings(settings, family)
    # A key that is null says "none", one that is absent says what the family always has.
    given = {key: value for key, value in settings.items()
             if value is not None or key not in ("head_dim", "rope_theta")}
    # Gemma 2 was first published with this name, which transformers no longer reads.
    named_first = given.pop("sliding_window_size", None)
    if named_first is not None and given.setdefault("sliding_window", named_first) != named_first:
        problems.append(
            f"sliding_window_size is {named_first}, expected that of sliding_window, "
            f"{given['sliding_window']}"
        )
    settings = dict(family.defaults) | given
    problems += [
        f"{key} is missing"
        for key in (*SIZES, "rms_norm_eps", "max_position_embeddings", *_further(settings, family))
        if settings.get(key) is None
    ]
    problems += _of_wrong_types(settings)
    windows, rotations = {}, {}
    if not problems:
        windows = _read_windows(settings, family, problems)
        rotations = _read_rotations(settings, windows, problems)
    if problems:
        raise PretrainedError(
            f"{path}: {'; '.join(problems)}. The decoder would compute something else; use a model "
            "without these settings, or correct the file."
        )
    heads = settings["num_attention_heads"]
    softcaps = {
        "attention_softcap": settings.get("attn_logit_softcapping"),
        "logit_softcap": settings.get("final_logit_softcapping"),
    }
    try:
        return decoder_config.DecoderConfig(
            **{ours: settings[theirs] for theirs, ours in SIZES.items()},
            num_kv_heads=settings.get("num_key_value_heads") or heads,
            # transformers derives the head size when the key is absent (Qwen2 never writes it).
            head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
            norm_eps=float(settings["rms_norm_eps"]),
            tie_embeddings=bool(settings.get("tie_word_embeddings", False)),
            max_position_embeddings=settings["max_position_embeddings"],
            model_type=family.model_type,
            query_scale_dim=_query_scale(settings, family),
            **{name: value for name, value in softcaps.items() if name in family.free},
            **family.fixed,
            **windows,
            **rotations,
        )
    except ValueError as error:
        said = str(error)
        for theirs, ours in _NAMES.items():
            said = said.replace(f"model.{ours} ", f"{theirs} ")
        raise PretrainedError(f"{path}: {said}") from error


def _query_scale(settings: Mapping[str, Any], family: Family) -> float | None:
    return float(settings["query_pre_attn_scalar"]) if family.query_scale else None


def _text_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The language part of a Gemma 3 that also sees images, whose image part is not used here."""
    if not _sees_images(settings):
        return settings
    return {"model_type": "gemma3_text"} | settings["text_config"]


def _sees_images(settings: Mapping[str, Any]) -> bool:
    return settings.get("model_type") == "gemma3" and isinstance(settings.get("text_config"), dict)


def layers_module(directory: str | os.PathLike) -> str:
    """Where transformers has the layers of a folder's model: what adapters for it are named after.

    A folder without config.json, or a name that is no folder, is taken for a model of text alone.
    """
    path = pathlib.Path(directory).expanduser() / FILE
    if path.exists() and _sees_images(read_object(path)):
        return "model.language_model.layers"
    return "model.layers"


def _unsupported_settings(settings: Mapping[str, Any], family: Family) -> list[str]:
    problems = []
    off = {key: allowed for key, allowed in OFF.items() if key not in family.fixed}
    if family.attention_softcap:
        del off["attn_logit_softcapping"]
    if family.logit_softcap:
        del off["final_logit_softcapping"]
    key = family.activation_key
    if settings.get(key, family.activation) != family.activation:
        problems.append(f"{key} is {settings[key]!r}, expected {family.activation!r}")
    for key, allowed in off.items():
        if key in settings and settings[key] not in allowed:
            problems.append(f"{key} is {settings[key]!r}, expected {allowed[0]!r}")
    known = _READ | NEUTRAL | set(OFF) | family.more_keys | {family.activation_key}
    known |= {"sliding_window"} if family.pattern != "none" else set()
    known |= {"query_pre_attn_scalar"} if family.query_scale else set()
    # A switch that is off changes nothing, whatever it is called.
    problems += [
        f"{key} is {settings[key]!r}, a setting not known here"
        for key in sorted(set(settings) - known) if settings[key] not in (None, False)
    ]
    return problems


def _further(settings: Mapping[str, Any], family: Family) -> list[str]:
    """Keys that this family needs beyond those of all."""
    needed = ["query_pre_attn_scalar"] if family.query_scale else []
    has_layers = settings.get("layer_types") is not None or not settings.get("use_sliding_window")
    by_number = family.pattern == "from max_window_layers" and not has_layers
    return needed + (["max_window_layers"] if by_number else [])


def _of_wrong_types(settings: Mapping[str, Any]) -> list[str]:
    """What must be a number, a list or an object and is another thing."""
    problems = []
    for key in (*_COUNTS, *_NUMBERS):
        value = settings.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not is_number:
            problems.append(f"{key} is {value!r}, expected a number")
        elif value is not None and key in _COUNTS and (value < 1 or not isinstance(value, int)):
            problems.append(f"{key} is {value!r}, expected a positive integer")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(settings.get(key), Mapping | None):
            problems.append(f"{key} is {settings[key]!r}, expected an object")
    for kind in (_FULL, _LOCAL):
        entry = (settings.get("rope_parameters") or {}).get(kind) if not problems else None
        if not isinstance(entry, Mapping | None):
            problems.append(f"rope_parameters.{kind} is {entry!r}, expected an object")
    if not isinstance(settings.get("layer_types"), list | None):
        problems.append(f"layer_types is {settings['layer_types']!r}, expected a list")
    for key in ("tie_word_embeddings", "use_sliding_window"):
        if not isinstance(settings.get(key), bool | None):
            problems.append(f"{key} is {settings[key]!r}, expected true or false")
    for key in ("rope_theta", "rope_local_base_freq"):
        if settings.get(key) == 0:
            problems.append(f"{key} is 0, expected more")
    return problems


def _read_windows(
    settings: Mapping[str, Any], family: Family, problems: list[str]
) -> dict[str, Any]:
    """Our `sliding_window` and `window_layers`."""
    num, size = settings["num_hidden_layers"], settings.get("sliding_window")
    if family.pattern == "from max_window_layers" and not settings.get("use_sliding_window"):
        size = None
    kinds = settings.get("layer_types")
    if kinds is None:
        local = _usual_layers(settings, family, size, num)
    else:
        strangers = sorted(set(map(str, kinds)) - {_FULL, _LOCAL})
        if strangers or len(kinds) != num:
            problems.append(
                f"layer_types has {len(kinds)} entries of {sorted(set(map(str, kinds)))}, expected "
                f"{num} of {[_FULL, _LOCAL]}"
            )
            return {}
        local = [kind == _LOCAL for kind in kinds]
    if family.pattern in ("none", "all") and any(local) != all(local):
        # transformers ignores the list in these families.
        problems.append(f"layer_types differ, which models of type {family.model_type} cannot have")
    if any(local) and (size is None or family.pattern == "none"):
        problems.append(
            f"layer_types has {_LOCAL!r} but there is no window (sliding_window, "
            "use_sliding_window)"
        )
    if family.pattern == "all" and size is not None and not all(local):
        problems.append(f"layer_types has {_FULL!r} but sliding_window is {size}")
    if not any(local):
        return {}
    return {"sliding_window": size, "window_layers": None if all(local) else tuple(local)}


def _usual_layers(
    settings: Mapping[str, Any], family: Family, size: int | None, num: int
) -> list[bool]:
    if family.pattern == "none" or size is None:
        return [False] * num
    if family.pattern == "all":
        return [True] * num
    if family.pattern == "from max_window_layers":
        return [layer >= settings["max_window_layers"] for layer in range(num)]
    every = settings.get("sliding_window_pattern") or settings["full_every"]
    return [(layer + 1) % every != 0 for layer in range(num)]


def _read_rotations(
    settings: Mapping[str, Any], windows: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    """Our `rope_theta`, `rope_scaling` and `local_rope_theta`."""
    new, old = settings.get("rope_parameters") or {}, settings.get("rope_scaling") or {}
    length = settings["max_position_embeddings"]
    theta = settings.get("rope_theta") or 10_000.0
    local = settings.get("rope_local_base_freq")   # only where a family has two rotations
    per_kind = any(kind in new for kind in (_FULL, _LOCAL))
    if per_kind and local is None:
        problems.append(f"rope_parameters has an entry per kind of layer, {sorted(new)}, which only "
                        "Gemma 3 has")
        return {}
    if local is not None and new and not per_kind:
        problems.append(f"rope_parameters is {new}, expected an entry for each of {[_FULL, _LOCAL]}: "
                        "transformers reads no other in a Gemma 3")
    if local is not None:
        problems += _passed_over(new, old)
    full = _rotation("rope_parameters", (new.get(_FULL) or {}) if per_kind else new, theta, length,
                     problems)
    if old:
        if local is None and new and old.get("rope_theta", theta) != full[0]:
            problems.append(
                f"rope_scaling stands in the place of rope_parameters, but rope_parameters.rope_theta "
                f"({full[0]}) is neither in it nor beside it as rope_theta: move rope_scaling's settings "
                "into rope_parameters"
            )
        theirs = _rotation("rope_scaling", old, full[0], length, problems)
        if full[1] is not None and theirs != full:
            problems.append(f"rope_scaling {old} and rope_parameters {new} disagree")
        full = theirs
    if local is None:
        return {"rope_theta": full[0], "rope_scaling": full[1]}
    near = _rotation(f"rope_parameters.{_LOCAL}", new.get(_LOCAL) or {}, local, length, problems)
    if "sliding_window" not in windows:
        return {"rope_theta": full[0], "rope_scaling": full[1]}
    if windows["window_layers"] is None:
        return {"rope_theta": near[0], "rope_scaling": near[1]}
    if near == full:
        return {"rope_theta": full[0], "rope_scaling": full[1]}
    if near[1] is not None:
        problems.append(f"rope_parameters.{_LOCAL}.rope_type is {near[1].rope_type!r}, expected "
                        "'default'")
    return {"rope_theta": full[0], "rope_scaling": full[1], "local_rope_theta": near[0]}


def _passed_over(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """What transformers does not read of the rotations of a Gemma 3, though it does of all others."""
    entries = {f"rope_parameters.{kind}": new.get(kind) or {} for kind in (_FULL, _LOCAL)}
    problems = [
        f"{key}.truncate is {entry['truncate']!r}, which transformers passes over in a Gemma 3"
        for key, entry in (entries | {"rope_scaling": old}).items()
        if entry.get("truncate") not in (None, True)
    ]
    if old.get("type", "default") != "default" and "rope_type" not in old and not new:
        problems.append(f"rope_scaling.type is {old['type']!r}, which transformers passes over in a "
                        "Gemma 3: call it rope_type")
    return problems


# Keys of each scaling: what it must have, what it may have.
_SCALINGS = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"),
               ("original_max_position_embeddings",)),
    "yarn": (("factor",), ("original_max_position_embeddings", "attention_factor", "beta_fast",
                           "beta_slow", "truncate")),
}


def scaling(key: str, settings: Mapping[str, Any], length: int | None) -> rope.Scaling | None:
    """A `rope_scaling` as a config.json has it, of a model made for texts of `length` tokens; None scales nothing.

    Raises:
        ValueError: with `key` and all that is wrong.
    """
    if "rope_theta" in settings:
        raise ValueError(f"{key} has a rope_theta, {settings['rope_theta']!r}: give it as model.rope_theta.")
    problems: list[str] = []
    _, made = _rotation(key, settings, 10_000.0, length, problems)
    if problems:
        raise ValueError(f"{'; '.join(problems)}. Write it as rope_scaling of a published config.json.")
    return made


def _rotation(
    key: str, settings: Mapping[str, Any], theta: float, length: int | None, problems: list[str]
) -> tuple[float, rope.Scaling | None]:
    """θ and scaling of one entry; `type` is the older spelling of `rope_type`."""
    values = {name: value for name, value in settings.items() if value is not None}
    old_kind = values.pop("type", "default")
    kind = values.pop("rope_type", old_kind)
    if kind not in ("default", *_SCALINGS):
        problems.append(f"{key}.rope_type is {kind!r}, expected one of "
                        f"{['default', *_SCALINGS]}")
        return theta, None
    strange = [
        f"{key}.{name} is {value!r}, expected a number"
        for name, value in values.items() if not isinstance(value, int | float)
    ]
    if strange:
        problems += strange
        return theta, None
    theta = float(values.pop("rope_theta", theta))
    if values.get("partial_rotary_factor") == 1:
        del values["partial_rotary_factor"]
    if kind == "default" and values.get("factor") == 1:
        del values["factor"]
    needed, optional = _SCALINGS.get(kind, ((), ()))
    # Some exporters write the keys of all kinds; a factor of 1 or the model's own length says nothing.
    if kind in ("default", "linear") and values.get("original_max_position_embeddings", 0) == length:
        del values["original_max_position_embeddings"]
    wrong = [f"{key}.{name} is missing" for name in needed if name not in values]
    wrong += [f"{key}.{name} is {value!r}, a setting not known here"
              for name, value in values.items() if name not in (*needed, *optional)]
    problems += wrong
    if kind == "default" or wrong:
        return theta, None
    if kind != "linear":
        values.setdefault("original_max_position_embeddings", length)
    try:
        return theta, rope.Scaling(rope_type=kind, **values)
    except ValueError as error:
        problems.append(f"{key}: {error}")
        return theta, None


def to_json(config: decoder_config.DecoderConfig, dtype: str) -> dict[str, Any]:
    """The settings of a config.json, for transformers 4 and 5: where the two spell one thing
    differently and neither minds the other's spelling, both are there.

    Raises:
        PretrainedError: no published family has these settings together.
    """
    family = _family_of(config)
    settings = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        family.activation_key: family.activation,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position_embeddings or _UNSAID_LENGTH,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if family.second_activation_key is not None:
        settings[family.second_activation_key] = family.activation
    settings |= {key: False for key in family.switches}
    if family.query_scale:
        scale = config.query_scale_dim or config.head_dim
        settings["query_pre_attn_scalar"] = int(scale) if scale == int(scale) else scale
        settings["attn_logit_softcapping"] = config.attention_softcap
        settings["final_logit_softcapping"] = config.logit_softcap
    return settings | _window_settings(config, family) | _rotation_settings(config, family)


def _family_of(config: decoder_config.DecoderConfig) -> Family:
    """The family that the model was read as if it still fits, else the first that does."""
    gaps = {family.model_type: differences(family, config) for family in FAMILIES}
    fitting = [family for family in FAMILIES if not gaps[family.model_type]]
    if not fitting:
        nearest = min(gaps, key=lambda name: len(gaps[name]))
        raise PretrainedError(
            f"no published family has these model settings together, so there is no config.json "
            f"for them. The nearest is {nearest}, which cannot have {gaps[nearest]}."
        )
    return next((family for family in fitting if family.model_type == config.model_type), fitting[0])


def _window_settings(config: decoder_config.DecoderConfig, family: Family) -> dict[str, Any]:
    size, num = config.sliding_window, config.num_layers
    if family.pattern == "none":
        return {}
    if family.pattern == "all":
        return {"sliding_window": size}
    layers = config.window_layers or (size is not None,) * num
    settings: dict[str, Any] = {
        "layer_types": [_LOCAL if local else _FULL for local in layers],
        "sliding_window": size,
    }
    if family.pattern == "every nth is full" and size is None:  # transformers wants one for no layer, too
        settings["sliding_window"] = family.defaults["sliding_window"]
    if family.pattern == "from max_window_layers":
        settings["use_sliding_window"] = size is not None
        settings["max_window_layers"] = layers.index(True) if any(layers) else num
    return settings


def _rotation_settings(config: decoder_config.DecoderConfig, family: Family) -> dict[str, Any]:
    scaling = _scaling_settings(config.rope_scaling)
    full = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    settings = {"rope_theta": config.rope_theta, "rope_scaling": scaling}
    if "rope_local_base_freq" not in family.defaults:
        return settings | {"rope_parameters": full}
    # Where no layer has the window, or all have it, both kinds get the one rotation.
    settings["rope_local_base_freq"] = config.local_rope_theta or config.rope_theta
    has_window = config.sliding_window is not None
    if scaling is not None and has_window and config.local_rope_theta is None:
        # The older spelling scales the layers without a window alone.
        return settings | {"rope_parameters": {_FULL: full, _LOCAL: full}}
    # The older spelling alone: vLLM on transformers 4 fails on entries per kind of layer.
    return settings


def _scaling_settings(scaling: rope.Scaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    needed, optional = _SCALINGS[scaling.rope_type]
    values = {name: getattr(scaling, name) for name in (*needed, *optional)}
    return {"rope_type": scaling.rope_type,
            **{name: value for name, value in values.items() if value is not None}}


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder, or PretrainedError."""
    if said := git_lfs.advice(path):
        raise PretrainedError(said)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PretrainedError(
            f"{path} does not exist. Give the folder of a Hugging Face model, with {FILE} and "
            "safetensors files in it."
        ) from error
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise PretrainedError(f"{path} holds {type(content).__name__}, expected an object.")
    return content


def write_object(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
