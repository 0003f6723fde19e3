"""The quick start: a small transformer learns to win unseen w2-o3-q4 TextWorld games from scratch.

    python -m jaxagentrl.main --config=configs/textworld_quickstart.py --workdir=runs/quickstart

Games: `tw-make custom --world-size 2 --nb-objects 3 --quest-length 4`, theme `basic` (names such as
`thing6` and `Z-box`: a third of the tokens of `house` and no less skill). 300 walkthroughs, each under
16 namings, are imitated until the loss on actions is 0.31, which is before the model is sure of what it
copies; 160 iterations of RL follow on 500 other games under four namings, 256 episodes each, with
TextWorld's progress signal as the turns' reward and GiGPO's credit. Twelve turns are three times what
a walkthrough takes: a slip can be made good. Three refused commands in a row end an episode: of the
games that are won hardly one holds two. At a learning rate of 8e-4 with five steps of warm-up, runs of
the same seed ended anywhere between 50 and 63 % (docs/quickstart.md).

Expected on two CPU cores: see the table in README.md.
"""

import ml_collections

from jaxagentrl import methods


def optional(value: int | float) -> ml_collections.FieldReference:
    """A number that a config built on this one may set to None, and the command line to a number."""
    return ml_collections.FieldReference(value, field_type=type(value))


def get_config(method: str = "") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    # Compiled programs outlive the process; None leaves that to jax's own setting.
    config.compilation_cache_dir = "~/.cache/jaxagentrl/compiled"
    config.env = dict(
        name="textworld",
        params=dict(family="custom", world_size=2, nb_objects=3, quest_length=4, theme="basic"),
        cache_dir="~/.cache/jaxagentrl/textworld",
        options=dict(),
        num_workers=2,
    )
    # (first seed, number of seeds) of each split.
    config.splits = dict(demo=(40001, 300), train=(50001, 500), test=(1, 300))
    # Under how many names each game is played (envs_host/naming.py); held-out games as they are.
    config.namings = dict(demo=16, train=4)
    config.pool = dict(
        num_workers=2, step_limit_s=10.0, reset_limit_s=30.0, worker_memory_mb=2000.0
    )
    config.prompt = dict(
        style="brief",
        show_admissible=False,
        # A system message, and variables of the tokenizer's chat template such as enable_thinking=False.
        system=ml_collections.config_dict.placeholder(str),
        template_options=dict(),
    )
    config.tokenizer = dict(
        directory=ml_collections.config_dict.placeholder(str),
        vocab_size=768,
        names="parts",
        phrases=True,
        glue_tokens=True,
        # Names of the basic theme end in a number below 100.
        lexicon=(*(str(number) for number in range(100)), *(f"0{digit}" for digit in range(10))),
    )
    config.model = dict(
        directory=ml_collections.config_dict.placeholder(str),
        hidden_size=128,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=384,
    )
    config.sampling = dict(
        num_slots=256,
        num_waves=2,
        max_length=240,
        max_turn_tokens=12,
        filled_buckets=(64, 112, 176, 240),
        width_buckets=(24, 64),
        row_divisors=(1, 4, 16),
        cache_dtype="float32",
        linger_share=0.1,
    )
    config.rollout = dict(
        max_turns=12,
        max_refusals=optional(3),
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        cut_turns="end",
        stop_strings=(),
        context="end",
        context_keep=0.5,
        history_turns=2,
        straggler_s=ml_collections.config_dict.placeholder(float),
        episode_limit_s=ml_collections.config_dict.placeholder(float),
    )
    config.reward = dict(
        kind="intermediate",
        invalid_penalty=0.0,
        no_end_of_turn_penalty=0.0,
        intermediate_scale=optional(0.25),
        overlong_penalty=0.0,
        overlong_length=ml_collections.config_dict.placeholder(int),
        overlong_margin=ml_collections.config_dict.placeholder(int),
    )
    config.learner = dict(
        length_buckets=(80, 96, 112, 128, 144, 176, 240),
        tokens_per_part=1440,
        row_multiple=1,
        packing=False,
        # Two longest episodes. Longer rows share more and, with a model this small, spend it on attention.
        tree_length=480,
        remat="none",
        compute_dtype="float32",
    )
    config.mesh = dict(data=1, fsdp=1, tensor=1)
    # None: what the device says it has. The run is refused when its plan needs more.
    config.memory_limit_gb = ml_collections.config_dict.placeholder(float)
    # Of the weights that a run leaves in model/.
    config.export_dtype = "float32"
    config.lora = dict(
        rank=0,
        alpha=16.0,
        targets=("attention/(q|k|v|o)", "mlp/(gate|up|down)"),
        export="merged",
    )
    config.sft = dict(
        num_steps=240,
        # Imitation ends where a line of the log (a mean over log_every steps) is at this loss.
        target_loss=optional(0.31),
        batch_size=16,
        observation_weight=0.5,
        log_every=10,
        save_every=50,
        optimizer=dict(
            learning_rate=2e-3,
            warmup_steps=40,
            decay_steps=ml_collections.config_dict.placeholder(int),
            final_fraction=0.1,
            b1=0.9,
            b2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            moment_dtype="float32",
        ),
    )
    config.rl = dict(
        num_iterations=160,
        tasks_per_iteration=32,
        group_size=8,
        num_epochs=1,
        num_minibatches=1,
        discount=1.0,
        critic="none",
        critic_learning_rate=ml_collections.config_dict.placeholder(float),
        aggregation="token_mean",
        aggregation_constant=ml_collections.config_dict.placeholder(float),
        observation_weight=0.0,
        skip_zero_signal=True,
        eval_every=16,
        save_every=8,
        advantage=dict(
            name="gigpo",
            whiten=True,
            negative_weight=0.25,
            gae_lambda=1.0,
            group_scale="none",
            turn_horizon="episode",
            turn_discount=0.5,
            step_weight=3.0,
            first_visit=False,
        ),
        filter=dict(name="none", fraction=0.25, max_rounds=10, leave_out=()),
        curriculum=dict(
            order="uniform", share=0.5, threshold=0.5, window=8, horizons=(), horizon_iterations=40
        ),
        branching=dict(members=0, probability=0.5, entropy_weight=0.2, entropy_tokens=20),
        loss=dict(
            surrogate="clipped",
            clip_low=0.2,
            clip_high=0.28,
            dual_clip=optional(3.0),
            entropy_coefficient=0.0,
            value_coefficient=0.5,
            value_clip=optional(0.5),
            importance_cap=ml_collections.config_dict.placeholder(float),
        ),
        kl=dict(placement="none", estimator="k2", coefficient=0.0),
        optimizer=dict(
            learning_rate=5e-4,
            warmup_steps=12,
            decay_steps=160,
            final_fraction=0.1,
            b1=0.9,
            b2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            moment_dtype="float32",
        ),
    )
    # As arXiv 2510.01132 validates; at the stages' ends also greedily and as RL samples.
    config.eval = dict(temperature=0.4, other_temperatures=(0.0, 1.0), attempts=1)
    return methods.apply(config, method)
