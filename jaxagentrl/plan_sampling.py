"""How many bytes each device will hold for sampling: caches, the decoder's copy, the programs' own.

Caches and copy are counted from their shapes and places. The programs are compiled at their largest calls,
where they may need much, and not executed: the engine's warm-up does that.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxagentrl import calls, dispatch, learner, plan, sampling, shapes
from jaxagentrl.models import decoder, decoding_layout, sharding

# Below this share of the memory the programs are not compiled twice only to be measured.
_SMALL_SHARE = 0.05


class _Arrays(NamedTuple):
    """Shapes, types and places of arrays."""

    given: decoder.Params  # the decoder's parameters as they lie for training, adapters included
    policy: decoder.Params  # the same as the programs take them
    held: sampling.Held  # of one wave


def counted(
    model: decoder.DecoderConfig,
    trainable: learner.Params,
    frozen: learner.Params | None,
    mesh: jax.sharding.Mesh | None,
    *,
    options: Mapping[str, Any],
    compute_dtype: str,
) -> plan.Sampling:
    """What sampling takes but for its programs. Nothing is compiled, nothing put on a device.

    Args:
        trainable, frozen: parameters, or their shapes and places.
        options: `config.sampling`.
        compute_dtype: `config.learner.compute_dtype`, which sampling shares.
    """
    arrays = _arrays(model, trainable, frozen, mesh, options, compute_dtype)
    return _count(arrays, options["num_waves"], mesh)


def measured(
    model: decoder.DecoderConfig,
    trainable: learner.Params,
    frozen: learner.Params | None,
    mesh: jax.sharding.Mesh | None,
    *,
    options: Mapping[str, Any],
    compute_dtype: str,
    stop_ids: Sequence[int],
    restricted: bool,
    limit: int,
) -> plan.Sampling:
    """What sampling takes; where that may be much, its programs are compiled to be measured.

    Args:
        trainable, frozen, options, compute_dtype: as of `counted`.
        stop_ids, restricted: as the engine is told.
        limit: bytes that a device has.
    """
    arrays = _arrays(model, trainable, frozen, mesh, options, compute_dtype)
    found = _count(arrays, options["num_waves"], mesh)
    with _for_decoding(mesh):
        possible = _possible(model, options)
        *_, (rows, width, filled) = possible.extends()
        # An extend's scores of attention, float32, of a device's rows.
        scores = 4 * rows // possible.shards.count * model.num_heads * width * filled
        much = found.cache + plan.per_device(arrays.policy) + scores
        if much <= _SMALL_SHARE * limit:
            return found
        largest = _largest_calls(model, arrays, possible, options, stop_ids, restricted=restricted)
        sizes = [
            plan.program_bytes(call.program.lower(held=arrays.held, **call.arguments), "sampling")
            for call in largest
        ]
        at_once = dispatch.side_by_side(options["num_waves"])
    return plan.Sampling(found.cache, {**found.needed, "sampling": at_once * max(sizes)})


def _possible(model: decoder.DecoderConfig, options: Mapping[str, Any]) -> shapes.Shapes:
    """Shapes that the engine's calls may have."""
    names = ("max_length", "filled_buckets", "width_buckets", "row_divisors")
    slots = options["num_slots"] // options["num_waves"]
    return shapes.of_wave(model, slots, **{name: options[name] for name in names})


def _for_decoding(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager[None]:
    """The mesh that sampling uses, in use."""
    return sharding.use(None if mesh is None else sharding.decoding_mesh(mesh))


def _arrays(
    model: decoder.DecoderConfig,
    trainable: learner.Params,
    frozen: learner.Params | None,
    mesh: jax.sharding.Mesh | None,
    options: Mapping[str, Any],
    compute_dtype: str,
) -> _Arrays:
    with _for_decoding(mesh):
        slots = _possible(model, options).shards.num_slots
    sizes = (slots, options["max_length"], options["cache_dtype"])
    most = sampling.most(options["width_buckets"], options["max_turn_tokens"])
    held = jax.eval_shape(lambda: sampling.init(model, *sizes, most=most))
    given = sharding.abstract(
        jax.eval_shape(learner.policy_of, (frozen or {}) | trainable), mesh
    )
    with sharding.use(mesh):
        policy = jax.eval_shape(lambda x: decoding_layout.for_decoding(x, compute_dtype), given)
    if mesh is not None:
        local = sharding.decoding_mesh(mesh)
        held = sampling.Held(
            sharding.abstract_cache(held.caches, local), sharding.abstract_rows(held.hidden, local)
        )
        policy = sharding.abstract(policy, local)
    return _Arrays(given, policy, held)


def _count(arrays: _Arrays, num_waves: int, mesh: jax.sharding.Mesh | None) -> plan.Sampling:
    copy = _copy_bytes(arrays.given, arrays.policy, mesh)
    return plan.Sampling(plan.per_device(arrays.held) * num_waves, {"decoding copy": copy})


def _copy_bytes(given: Any, policy: Any, mesh: jax.sharding.Mesh | None) -> int:
    """Of the decoder's parameters as sampling takes them, without those that are at hand so."""
    at_hand = dict(jax.tree_util.tree_flatten_with_path(given)[0])
    leaves = jax.tree_util.tree_flatten_with_path(policy)[0]
    if mesh is None:
        return plan.per_device([x for path, x in leaves if x != at_hand.get(path)])
    places = jax.tree.leaves(sharding.decoding_shardings(policy, mesh))

    def is_at_hand(path: Any, x: Any, where: jax.sharding.NamedSharding) -> bool:
        mine = at_hand.get(path)
        return mine is not None and mine.dtype == x.dtype and sharding.lies_at(mine, where)

    pairs = zip(leaves, places, strict=True)
    return plan.per_device([x for (path, x), where in pairs if not is_at_hand(path, x, where)])


def _largest_calls(
    model: decoder.DecoderConfig,
    arrays: _Arrays,
    possible: shapes.Shapes,
    options: Mapping[str, Any],
    stop_ids: Sequence[int],
    *,
    restricted: bool,
) -> list[calls.Call]:
    """Of each program the engine's largest call, without rows."""
    (*_, extend), (*_, fork), (*_, decode) = possible.extends(), possible.forks(), possible.decodes()
    program = sampling.make_decode(model, max_turn_tokens=options["max_turn_tokens"])
    split = possible.shards
    return [
        calls.extend(sampling.make_extend(model, options["cache_dtype"]), arrays.policy, {}, extend, shards=split),
        calls.fork(sampling.make_fork(), [], *fork, shards=split),
        calls.decode(
            program,
            arrays.policy,
            {},
            *decode,
            shards=split,
            stop_ids=np.array(sorted(set(stop_ids)), np.int32),
            restricted=restricted,
        ),
    ]
