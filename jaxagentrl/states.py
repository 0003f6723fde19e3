"""The training state of a run: how each stage begins, where it continues, the reference, the export."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxagentrl import (
    checkpoints, hosts, learner, optimizer, plan, prepare, progress, reinforce, workdir,
)
from jaxagentrl.models import lora, pretrained, sharding
from jaxagentrl.types import TrainState


def for_sft(
    params: learner.Params, config: Mapping[str, Any], setup: prepare.Setup
) -> TrainState:
    """The model as it was loaded or drawn; without an optimizer's state where there are no steps to take."""
    sft = config["sft"]
    chain = optimizer.make(**sft["optimizer"]) if sft["num_steps"] else optax.identity()
    return fresh(params, chain, setup.mesh)


def for_rl(
    params: learner.Params, config: Mapping[str, Any], setup: prepare.Setup
) -> TrainState:
    """The policy with a fresh critic and a fresh optimizer."""
    params = learner.with_critic(params, setup.model, critic=config["rl"]["critic"])
    return fresh(params, reinforce.make_optimizer(config["rl"]), setup.mesh)


def begin_rl(state: TrainState, config: Mapping[str, Any], setup: prepare.Setup) -> TrainState:
    """RL's first state, from the last one of imitation, which is not to be used any more."""
    _free(state.opt_state)  # else there would be two while the new one is made
    return for_rl(state.params, config, setup)


def restore(
    folder: workdir.Workdir, config: Mapping[str, Any], setup: prepare.Setup
) -> tuple[TrainState, dict[str, Any]]:
    """The newest checkpoint's state, or a new run's.

    It takes the place of `setup.trainable`, which is not to be used any more.
    """
    anywhere = dataclasses.replace(setup, mesh=None)

    def shapes(start: Any, params: learner.Params) -> TrainState:
        made = jax.eval_shape(lambda given: start(given, config, anywhere), params)
        return sharding.abstract(made, setup.mesh)

    sft_like = shapes(for_sft, setup.trainable)
    rl_like = shapes(for_rl, sft_like.params)
    for stage, like in (("rl", rl_like), ("sft", sft_like)):
        if checkpoints.latest_step(folder.checkpoints / stage) is None:
            continue
        _free(setup.trainable)
        restored = checkpoints.restore(folder.checkpoints / stage, like)
        progress.notice(f"continuing after {stage} step {restored[1]['step']}")
        return restored
    state = for_sft(setup.trainable, config, setup)
    return state, {"stage": "start", "step": 0, "is_over": False, "lines": 0, "sampler": {}}


def reference(
    folder: workdir.Workdir, state: TrainState, mesh: jax.sharding.Mesh | None
) -> learner.Params:
    """The frozen policy that RL started from: kept once, beside the checkpoints.

    Under adapters it is the adapters of then, over the model that is there anyway.

    Raises:
        ValueError: it is gone.
    """
    kept_in = folder.checkpoints / "reference"
    kept = {key: state.params[key] for key in plan.POLICY if key in state.params}
    if checkpoints.latest_step(kept_in) is None:
        if done := int(state.iteration):
            raise ValueError(
                f"{kept_in} is gone: what the policy was before its {done} iterations of RL, from which rl.kl measures. "
                "Bring the folder back, or start in another workdir."
            )
        kept = jax.tree.map(jnp.copy, kept)
        checkpoints.save(kept_in, step=0, state=kept, host={}, keep=1)
        return kept
    restored, _ = checkpoints.restore(kept_in, sharding.abstract(kept, mesh))
    return restored


def export(
    folder: workdir.Workdir, config: Mapping[str, Any], setup: prepare.Setup, state: TrainState
) -> None:
    """The trained policy as a Hugging Face folder; adapters merged into it or in their own."""
    options, base = config["lora"], config["model"]["directory"]
    is_apart = options["rank"] and options["export"] == "separate"
    params = (setup.frozen or {}) | state.params
    # No critic; nor the model under separate adapters, if that is in a folder already.
    names = ["adapters"] if is_apart and base is not None else plan.POLICY
    params = sharding.to_first({name: params[name] for name in names if name in params}, setup.mesh)
    if not hosts.is_first():
        return
    if options["rank"] and not is_apart:
        scale = options["alpha"] / options["rank"]
        params["policy"] = lora.merge(
            params["policy"], params["adapters"], scale, dtype=config["export_dtype"]
        )
    if "policy" in params:
        pretrained.save(
            folder.model,
            setup.model,
            params["policy"],
            tokenizer=setup.chat_format.tokenizer,
            stop_ids=setup.stop_ids,
            dtype=config["export_dtype"],
        )
    if is_apart:
        base = base or str(folder.model)
        lora.save(folder.adapters, params["adapters"], alpha=options["alpha"], base=base)


def fresh(params: learner.Params, chain: Any, mesh: Any = None) -> TrainState:
    # Two counters, two buffers: the state is donated, and one buffer cannot be donated twice.
    params = sharding.place(params, mesh)
    init = chain.init
    if mesh is not None:
        init = jax.jit(lambda params: sharding.constrain_params(chain.init(params)))
    counters = [sharding.place(jnp.zeros((), jnp.int32), mesh) for _ in range(2)]
    return TrainState(*counters, params=params, opt_state=init(params))


def _free(tree: Any) -> None:
    """Gives arrays' memory back now, whoever still refers to them."""
    for leaf in jax.tree.leaves(tree):
        leaf.delete()
