"""The published families that the decoder can be, as a table: what their names mean in our settings.

A family is an architecture of `transformers`. What all of its models have is `fixed`; what its
config.json may say is `free`; what it leaves out has the default of that architecture. Sources are
the configuration files of `transformers` and those published with the models.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

# Keys of config.json that every family reads, with our name where it is a plain number.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
}

# Settings that change the numbers and that no family here uses: key → values that are harmless.
OFF = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "quantization_config": (None,),
    "num_local_experts": (None,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False, None),
    "pruned_heads": ({}, None),
}

# How answers are drawn, which transformers 4 keeps in config.json, too: with every other key where a
# config's `to_dict` was written. Of these a run has its own settings.
_GENERATION = {
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "max_new_tokens", "min_new_tokens", "min_p",
}

# Settings that do not change the logits of a forward pass: about training, storage or generation.
# pretraining_tp splits the same products; NEFTune's noise is of training alone.
NEUTRAL = _GENERATION | {
    "architectures", "auto_map", "attention_dropout", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "id2label",
    "initializer_range", "is_decoder", "is_llama_config", "label2id", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop",
    "return_dict", "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version",
    "use_cache", "_name_or_path", "_model_name_or_path", "_attn_implementation_autoset",
    "_commit_hash", "_flash_attn_2_enabled", "_attn_implementation", "attn_implementation",
    "decoder_start_token_id", "finetuning_task", "max_sequence_length", "neftune_noise_alpha", "prefix",
    "sep_token_id", "use_bfloat16",
}

_GEMMA = {
    "activation": "gelu_tanh",
    "norm_plus_one": True,
    "post_norms": True,
    "scale_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture."""

    model_type: str
    architecture: str
    fixed: Mapping[str, Any]  # our settings that every model of the family has
    free: frozenset[str]  # our settings that its config.json may choose
    defaults: Mapping[str, Any]  # of keys that a config.json may leave out
    activation_key: str = "hidden_act"
    activation: str = "silu"  # the one value of that key
    second_activation_key: str | None = None  # written too
    # Which of n layers have the window when `layer_types` does not say.
    pattern: str = "none"  # "all", "from max_window_layers", "every nth is full"
    query_scale: bool = False  # reads query_pre_attn_scalar
    attention_softcap: bool = False  # reads attn_logit_softcapping
    logit_softcap: bool = False  # reads final_logit_softcapping
    more_keys: frozenset[str] = frozenset()  # read or without meaning in this family
    switches: tuple[str, ...] = ("attention_bias",)  # written as off
    splits_hidden: bool = False  # transformers wants the hidden size to be a multiple of the heads


_GEMMA_KEYS = {
    "splits_hidden": True,
    "activation_key": "hidden_activation",
    "activation": "gelu_pytorch_tanh",
    "pattern": "every nth is full",
    "query_scale": True,
    "logit_softcap": True,
}

FAMILIES = (
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        fixed={},
        free=frozenset(),
        defaults={"max_position_embeddings": 2048},
        # Left by converters; Llama has no window whatever it says.
        more_keys=frozenset({"sliding_window", "max_window_layers"}),
        switches=("attention_bias", "mlp_bias"),
        splits_hidden=True,
    ),
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        fixed={},
        free=frozenset({"sliding_window"}),
        defaults={"max_position_embeddings": 131_072, "sliding_window": 4096,
                  "num_key_value_heads": 8},
        pattern="all",
        switches=(),
    ),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        fixed={"attention_bias": True},
        free=frozenset({"sliding_window", "window_layers"}),
        defaults={"max_position_embeddings": 32_768, "sliding_window": 4096,
                  "max_window_layers": 28, "num_key_value_heads": 32},
        pattern="from max_window_layers",
        more_keys=frozenset({"use_sliding_window", "max_window_layers"}),
        switches=(),   # its biases are no setting
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        fixed={"qk_norm": True},
        free=frozenset({"sliding_window", "window_layers"}),
        defaults={"max_position_embeddings": 32_768, "sliding_window": 4096,
                  "max_window_layers": 28, "num_key_value_heads": 32, "head_dim": 128},
        pattern="from max_window_layers",
        more_keys=frozenset({"use_sliding_window", "max_window_layers"}),
    ),
    Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        fixed=_GEMMA,
        free=frozenset({"sliding_window", "window_layers", "query_scale_dim", "attention_softcap",
                        "logit_softcap"}),
        defaults={"max_position_embeddings": 8192, "sliding_window": 4096, "head_dim": 256,
                  "num_key_value_heads": 4, "tie_word_embeddings": True, "full_every": 2,
                  "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
                  "final_logit_softcapping": 30.0},
        attention_softcap=True,
        # Published beside hidden_activation, which is the one that counts; vLLM reads it all the same.
        more_keys=frozenset({"hidden_act", "sliding_window_size"}),
        second_activation_key="hidden_act",
        **_GEMMA_KEYS,
    ),
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        fixed=_GEMMA | {"qk_norm": True},
        free=frozenset({"sliding_window", "window_layers", "query_scale_dim", "logit_softcap",
                        "local_rope_theta"}),
        defaults={"max_position_embeddings": 131_072, "sliding_window": 4096, "head_dim": 256,
                  "num_key_value_heads": 4, "tie_word_embeddings": True, "full_every": 6,
                  "query_pre_attn_scalar": 256, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                  # The language part of a Gemma 3 with images names only what it has otherwise.
                  "vocab_size": 262_208, "num_attention_heads": 8, "rms_norm_eps": 1e-6},
        more_keys=frozenset({"rope_local_base_freq", "sliding_window_pattern",
                             "_sliding_window_pattern"}),
        **_GEMMA_KEYS,
    ),
)

BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES}

# Our settings that tell families apart.
_FEATURES = (
    "attention_bias", "qk_norm", "activation", "sliding_window", "window_layers",
    "local_rope_theta", "norm_plus_one", "post_norms", "scale_embeddings", "query_scale_dim",
    "attention_softcap", "logit_softcap",
)


def differences(family: Family, config: Any) -> dict[str, Any]:
    """Settings of a decoder config, by name, that models of the family cannot have."""
    plain = {field.name: field.default for field in dataclasses.fields(config)}
    expected = {name: plain[name] for name in _FEATURES} | dict(family.fixed)
    found = {
        name: getattr(config, name)
        for name in _FEATURES
        if name not in family.free and getattr(config, name) != expected[name]
    }
    if family.splits_hidden and config.hidden_size % config.num_heads:
        found |= {"hidden_size": config.hidden_size, "num_heads": config.num_heads}
    if family.query_scale and (config.query_scale_dim or 0) % 1:  # an integer in config.json
        found["query_scale_dim"] = config.query_scale_dim
    # Of rotations per kind of layer transformers does not read it.
    if "local_rope_theta" in family.free and config.rope_scaling and not config.rope_scaling.truncate:
        found["rope_scaling.truncate"] = config.rope_scaling.truncate
    return found
