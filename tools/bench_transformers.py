"""transformers' `generate` as two contenders of `bench_rollout`."""

import numpy as np
import torch
import transformers


def load(world):
    return transformers.AutoModelForCausalLM.from_pretrained(world.folder, dtype=torch.float32).eval()


def reprefill(world, lockstep, budget: int):
    """Batched `generate` on left-padded conversations, from nothing every turn."""
    model = load(world)

    @torch.no_grad()
    def sample_turn(histories, new, live, state):
        del new
        ids, mask = _left_pad([histories[i] for i in live])
        out = model.generate(ids, attention_mask=mask, **_generation(world, budget))
        return _cut(world, out[:, ids.shape[1] :].numpy(), live), state

    return lockstep(world, sample_turn)


def kept_cache(world, lockstep, budget: int):
    """`generate` given the cache of the turn before; rows that differ in length are padded for good."""
    model = load(world)

    @torch.no_grad()
    def sample_turn(histories, new, live, state):
        if state is None:
            ids, mask = _left_pad([new[i] for i in live])
            cache = None
        else:
            ids, mask, cache = state
            more, more_mask = _left_pad([new[i] for i in live])
            ids, mask = torch.cat([ids, more], 1), torch.cat([mask, more_mask], 1)
        out = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            return_dict_in_generate=True,
            **_generation(world, budget),
        )
        sampled = out.sequences[:, ids.shape[1] :]
        actions = _cut(world, sampled.numpy(), live)
        kept = torch.tensor([[t < len(actions[i]) for t in range(sampled.shape[1])] for i in live])
        mask = torch.cat([mask, kept.long()], 1)
        return actions, (out.sequences, mask, out.past_key_values)

    return lockstep(world, sample_turn)


def _generation(world, budget: int) -> dict:
    return dict(
        max_new_tokens=budget,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=world.stop_ids,
        pad_token_id=0,
    )


def _left_pad(rows):
    width = max(len(row) for row in rows)
    ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :], mask[index, width - len(row) :] = row, 1
    return torch.tensor(ids), torch.tensor(mask)


def _cut(world, sampled: np.ndarray, live) -> dict[int, np.ndarray]:
    """What each row sampled, up to and with its first stop id."""
    stops = np.isin(sampled, world.stop_ids)
    ends = np.where(stops.any(1), stops.argmax(1) + 1, sampled.shape[1])
    return {i: sampled[row, : ends[row]].astype(np.int32) for row, i in enumerate(live)}
