"""Published methods, each as what it sets in a config: `--config=configs/textworld_quickstart.py:grpo`.

A method here is what its paper says of rewards, credit, loss and KL, on whatever the config plays and trains: the
score at the end is the only reward, every episode is in the update, nothing is whitened, weighed or filtered but where
the paper does it. Sizes, rates, schedules and the number of episodes of an iteration stay the config's. Ratios and clips
matter where an iteration has several optimizer steps; `rl.num_minibatches` = 4 also wants `rl.optimizer.decay_steps`
times 4; a method that takes one step divides it.

Flags change what a method has set, and do not change what it is set from: it reads the file. In a config of your own:

    from jaxagentrl import methods

    def get_config(method=""):
        config = ...
        return methods.apply(config, method)
"""

_GROUP_SIZE = 8  # where the config's groups are of one episode


def ppo(config) -> None:
    """Token GAE across turns and a critic of its own, as arXiv 2510.01132 trains agents: γ = λ = 1, a game is played once,
    k1 in the reward, a critic whose rate is ten times the policy's.

    The loss of PPO's own paper (1707.06347) has no reference, dual clip or value clip; its γ would count per token.
    """
    _plain(config)
    _play_once(config)
    config.rollout.temperature = 0.7
    _learn_values(config)
    config.rl.loss.dual_clip = 3.0
    config.rl.kl.update(placement="reward", estimator="k1", coefficient=0.01)


def grpo(config) -> None:
    """arXiv 2402.03300: difference to the group's mean over its standard deviation, mean within each episode first, k3 in
    the loss with β = 0.04. There groups are of 64."""
    _plain(config)
    _play_in_groups(config)
    config.rl.advantage.update(name="group_normalized", group_scale="std")
    config.rl.aggregation = "sequence_mean_token_mean"
    config.rl.kl.update(placement="loss", estimator="k3", coefficient=0.04)


def dr_grpo(config) -> None:
    """arXiv 2503.20783: GRPO without the standard deviation, without lengths in the denominator and without KL. The
    constant is the most tokens that an episode may sample: in its turns, and where it has one context in all."""
    _plain(config)
    _play_in_groups(config)
    config.rl.advantage.update(name="group_normalized", group_scale="none")
    config.rl.aggregation = "constant"
    config.rl.aggregation_constant = float(_most_tokens(config))


def dapo(config) -> None:
    """arXiv 2503.14476: GRPO with a wider clip above, the mean over all tokens and no KL; games are played until the
    iteration's groups are all mixed; the last fifth of what an episode may sample costs up to half a win, which is 1 of
    rewards of −1 and 1 there. Sixteen optimizer steps an iteration there."""
    _plain(config)
    _play_in_groups(config)
    config.rl.advantage.update(name="group_normalized", group_scale="std")
    config.rl.loss.clip_high = 0.28
    config.rl.filter.update(name="dynamic_sampling", max_rounds=10)
    most = _most_tokens(config)
    config.reward.update(overlong_penalty=0.5, overlong_length=most, overlong_margin=max(1, most // 5))


def arpo(config) -> None:
    """arXiv 2507.19849: half of a group is played from the start, the rest branches off where the policy is less sure than
    it was at first; GRPO's credit, mean over all tokens, no KL. Eight of sixteen there, entropies of the first 20 tokens."""
    _plain(config)
    _play_in_groups(config)
    config.rl.advantage.update(name="group_normalized", group_scale="std")
    config.rl.branching.update(
        members=config.rl.group_size // 2, probability=0.5, entropy_weight=0.2, entropy_tokens=20
    )


def gspo(config) -> None:
    """arXiv 2507.18071: one ratio for each text, clipped far closer; the group's mean and standard deviation, mean
    within each episode first, no KL. Four optimizer steps an iteration there; with one its loss is GRPO's."""
    _plain(config)
    _play_in_groups(config)
    config.rl.advantage.update(name="group_normalized", group_scale="std")
    config.rl.aggregation = "sequence_mean_token_mean"
    config.rl.loss.update(surrogate="gspo", clip_low=3e-4, clip_high=4e-4)


def rloo(config) -> None:
    """arXiv 2402.14740: the episode as one action, so that its log-probs are summed; the mean of the group's others as its
    baseline; no ratio, so one optimizer step an iteration; k1 in the reward. β is a choice by task."""
    _plain(config)
    _play_in_groups(config)
    _one_step(config)
    config.rl.advantage.name = "leave_one_out"
    config.rl.aggregation = "sequence_mean_token_sum"
    config.rl.loss.surrogate = "policy_gradient"
    config.rl.kl.update(placement="reward", estimator="k1", coefficient=0.03)


def reinforce_plus_plus(config) -> None:
    """arXiv 2501.03262: a game is played once, k1 in the reward, rewards-to-go whitened over the batch (by the estimator,
    so `whiten` is off), PPO's clip."""
    _plain(config)
    _play_once(config)
    config.rl.discount = 1.0
    config.rl.advantage.name = "reinforce_plus_plus"
    config.rl.kl.update(placement="reward", estimator="k1", coefficient=0.01)


def gigpo(config) -> None:
    """arXiv 2505.10978: the episode against its group and each turn against its anchor state, ω = 1, γ = 0.95 per turn, k3
    in the loss with β = 0.01, 0.1 off an invalid action where a win is 10.

    There an action is invalid by its form, whatever the game makes of it. A turn without its end has none, and costs
    0.01 (docs/study.md, on a penalty for refused commands; nothing with `rollout.cut_turns` "send", which plays it). Of
    answers in tags the tags are the form, too. The paper reports `group_scale` "std" and "none".
    """
    _plain(config)
    _play_in_groups(config)
    config.reward.no_end_of_turn_penalty = 0.01
    if config.prompt.style == "think_action":
        config.reward.invalid_penalty = 0.01
    config.rl.advantage.update(name="gigpo", group_scale="std", turn_discount=0.95, step_weight=1.0)
    config.rl.kl.update(placement="loss", estimator="k3", coefficient=0.01)


def starpo_s(config) -> None:
    """arXiv 2504.20073 (RAGEN): PPO's critic with γ = λ = 1 on groups, of which the quarter whose returns differ most is
    learned from; no KL, a wider clip above, 0.001 of the entropy, mean within each episode first. Eight games of sixteen
    episodes there, and the critic's rate is ten times the policy's."""
    _plain(config)
    _play_in_groups(config)
    _learn_values(config)
    config.rollout.temperature = 1.0
    config.rl.aggregation = "sequence_mean_token_mean"
    config.rl.loss.update(clip_high=0.28, entropy_coefficient=0.001)
    config.rl.filter.update(name="uncertainty", fraction=0.25)


def scaling_inter(config) -> None:
    """arXiv 2509.08755 (AgentGym-RL): GRPO with β = 0.001 whose episodes may at first have a third of the config's turns,
    then two thirds, then all, a third of the iterations each. There 10, 20 and 30 turns of 100 iterations each."""
    grpo(config)
    config.rl.kl.coefficient = 0.001
    longest = config.rollout.max_turns
    thirds = {-(-longest // 3), -(-2 * longest // 3)} - {longest}
    config.rl.curriculum.update(
        horizons=tuple(sorted(thirds)), horizon_iterations=max(1, -(-config.rl.num_iterations // 3))
    )


METHODS = {
    method.__name__: method
    for method in (
        ppo, grpo, dr_grpo, dapo, arpo, gspo, rloo, reinforce_plus_plus, gigpo, starpo_s, scaling_inter
    )
}


def apply(config, name: str = ""):
    """Sets a method in a config.

    Args:
        config: `ml_collections.ConfigDict`, changed in place.
        name: one of `METHODS`; "" leaves the config's own.

    Returns:
        `config`.

    Raises:
        ValueError: there is no such method.
    """
    if name and name not in METHODS:
        raise ValueError(f"--config=<file>:{name} names no published method: it is one of {', '.join(METHODS)}.")
    if name:
        METHODS[name](config)
    return config


def _plain(config) -> None:
    """What the methods share, and what of a config's own credit they do without."""
    config.reward.update(kind="single", intermediate_scale=None, invalid_penalty=0.0, no_end_of_turn_penalty=0.0)
    config.reward.update(overlong_penalty=0.0, overlong_length=None, overlong_margin=None)
    config.rl.update(
        critic="none",
        critic_learning_rate=None,
        aggregation="token_mean",
        aggregation_constant=None,
        observation_weight=0.0,
        skip_zero_signal=False,
    )
    config.rl.advantage.update(whiten=False, negative_weight=1.0, turn_horizon="episode", first_visit=False)
    config.rl.loss.update(surrogate="clipped", clip_low=0.2, clip_high=0.2, dual_clip=None, entropy_coefficient=0.0)
    config.rl.kl.update(placement="none", coefficient=0.0)
    config.rl.filter.update(name="none", leave_out=())
    config.rl.branching.members = 0
    config.rl.curriculum.horizons = ()


def _learn_values(config) -> None:
    """GAE over all tokens of an episode, γ = λ = 1, by a critic whose rate is ten times the policy's."""
    config.rl.discount = 1.0
    config.rl.critic = "head" if config.lora.rank else "separate"  # a whole model more is not what adapters are for
    config.rl.critic_learning_rate = 10.0 * config.rl.optimizer.learning_rate
    config.rl.advantage.update(name="gae", gae_lambda=1.0, whiten=True)
    config.rl.loss.update(value_clip=0.5, value_coefficient=1.0)


def _most_tokens(config) -> int:
    """That an episode may sample: in its turns, and where it has one context in all."""
    tokens = config.rollout.max_turns * config.sampling.max_turn_tokens
    return min(tokens, config.sampling.max_length) if config.rollout.context == "end" else tokens


def _one_step(config) -> None:
    """An iteration is one optimizer step, on a schedule of as many iterations as before."""
    steps = config.rl.num_epochs * config.rl.num_minibatches
    config.rl.update(num_epochs=1, num_minibatches=1)
    config.rl.optimizer.warmup_steps //= steps
    if config.rl.optimizer.decay_steps is not None:
        config.rl.optimizer.decay_steps //= steps


def _play_once(config) -> None:
    """As many episodes of an iteration as there were, each of a game of its own."""
    config.rl.update(tasks_per_iteration=config.rl.tasks_per_iteration * config.rl.group_size, group_size=1)


def _play_in_groups(config) -> None:
    """As many episodes of an iteration as there were, in groups that have something to compare with."""
    if config.rl.group_size > 1:
        return
    episodes = config.rl.tasks_per_iteration
    if episodes % _GROUP_SIZE:
        raise ValueError(
            f"rl.tasks_per_iteration is {episodes} games played once, which are no groups of {_GROUP_SIZE}: give the config "
            "an rl.group_size of 2 or more."
        )
    config.rl.update(tasks_per_iteration=episodes // _GROUP_SIZE, group_size=_GROUP_SIZE)
