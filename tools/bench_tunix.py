"""Tunix's vanilla sampler as a contender of `bench_rollout` (`pip install google-tunix`).

Driven as its agentic path drives it: one conversation per call, the whole of it prefilled again every
turn, prompts padded to powers of two. `bench_rollout --against tunix` runs this.
"""

import jax
import numpy as np

try:
    from tunix.generate import sampler as tunix_sampler
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params as llama_params
except ImportError as error:
    raise SystemExit(f"Tunix cannot be imported ({error}): pip install google-tunix, and run bench_rollout.py "
                     "--against tunix") from error


class Ids:
    """A tokenizer whose texts are ids, so that Tunix samples from exactly our tokens."""

    def __init__(self, stop_id: int):
        self._stop_id = stop_id

    def encode(self, text: str, **_) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids, **_) -> str:
        return " ".join(str(int(i)) for i in ids)

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return self._stop_id

    def pad_id(self) -> int:
        return 0


def contender(world, lockstep, budget: int):
    """A function that plays the world's episodes with Tunix, as the other contenders do."""
    ours = world.config
    config = llama.ModelConfig(
        num_layers=ours.num_layers,
        vocab_size=ours.vocab_size,
        embed_dim=ours.hidden_size,
        hidden_dim=ours.intermediate_size,
        num_heads=ours.num_heads,
        head_dim=ours.head_dim,
        num_kv_heads=ours.num_kv_heads,
        rope_theta=int(ours.rope_theta),
        norm_eps=ours.norm_eps,
        weight_tying=True,
    )
    mesh = jax.make_mesh(
        (1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    with mesh:
        model = llama_params.create_model_from_safe_tensors(
            world.folder, config, mesh, dtype=jax.numpy.float32
        )
    sampler = tunix_sampler.Sampler(
        model,
        Ids(world.stop_ids[-1]),
        tunix_sampler.CacheConfig(
            cache_size=2 * world.max_length,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        ),
    )
    calls = iter(range(10**9))

    def sample_turn(histories, new, live, state):
        del new
        actions = {}
        for index in live:
            out = sampler(
                [" ".join(str(token) for token in histories[index])],
                max_generation_steps=budget,
                temperature=1.0,
                top_p=1.0,
                eos_tokens=world.stop_ids,
                seed=next(calls),
            )
            ids = np.asarray(out.tokens[0], np.int32)
            actions[index] = ids if len(ids) else np.array([world.stop_ids[-1]], np.int32)
        return actions, state

    return lockstep(world, sample_turn)
