"""config.json of published models, each with what our config is to be.

Put together from the publishers' files as they are quoted in public repositories and in the tests of
other readers of them, and, for SmolLM2-135M-Instruct, Mistral-7B-Instruct-v0.3 and Llama-3.2-3B-Instruct, from memory; the
hub itself is out of reach from where this was written.
"""

from jaxagentrl.models import rope

# Without what says nothing about the numbers.
_SHORT = {
    "Qwen2.5-0.5B-Instruct": (
        dict(model_type="qwen2", hidden_act="silu", hidden_size=896, intermediate_size=4864,
             max_position_embeddings=32768, max_window_layers=21, num_attention_heads=14,
             num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6,
             sliding_window=32768, tie_word_embeddings=True, use_sliding_window=False,
             vocab_size=151936),
        dict(head_dim=64, attention_bias=True, rope_theta=1e6, sliding_window=None)),
    "Qwen3-0.6B": (
        dict(model_type="qwen3", attention_bias=False, head_dim=128, hidden_act="silu",
             hidden_size=1024, intermediate_size=3072, max_position_embeddings=40960,
             max_window_layers=28, num_attention_heads=16, num_hidden_layers=28,
             num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000,
             sliding_window=None, tie_word_embeddings=True, use_sliding_window=False,
             vocab_size=151936),
        dict(head_dim=128, qk_norm=True, attention_bias=False)),
    "Llama-3.2-1B-Instruct": (
        dict(model_type="llama", attention_bias=False, head_dim=64, hidden_act="silu",
             hidden_size=2048, intermediate_size=8192, max_position_embeddings=131072,
             mlp_bias=False, num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8,
             pretraining_tp=1, rms_norm_eps=1e-5, rope_theta=5e5, tie_word_embeddings=True,
             rope_scaling={"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                           "original_max_position_embeddings": 8192, "rope_type": "llama3"},
             vocab_size=128256),
        dict(rope_scaling=rope.Scaling("llama3", 32.0, 8192))),
    "SmolLM2-360M-Instruct": (
        dict(model_type="llama", attention_bias=False, hidden_act="silu", hidden_size=960,
             intermediate_size=2560, is_llama_config=True, max_position_embeddings=8192,
             mlp_bias=False, num_attention_heads=15, num_hidden_layers=32, num_key_value_heads=5,
             pretraining_tp=1, rms_norm_eps=1e-5, rope_interleaved=False, rope_scaling=None,
             rope_theta=100000, tie_word_embeddings=True, vocab_size=49152,
             **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}),
        dict(head_dim=64, rope_theta=1e5, qk_norm=False)),
    "Mistral-7B-v0.1": (
        dict(model_type="mistral", hidden_act="silu", hidden_size=4096, intermediate_size=14336,
             max_position_embeddings=32768, num_attention_heads=32, num_hidden_layers=32,
             num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096,
             tie_word_embeddings=False, vocab_size=32000),
        dict(sliding_window=4096, window_layers=None, tie_embeddings=False)),
    "gemma-2-2b-it": (
        dict(model_type="gemma2", attention_bias=False, attn_logit_softcapping=50.0,
             cache_implementation="hybrid", final_logit_softcapping=30.0, head_dim=256,
             hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
             hidden_size=2304, intermediate_size=9216, max_position_embeddings=8192,
             num_attention_heads=8, num_hidden_layers=26, num_key_value_heads=4,
             query_pre_attn_scalar=256, rms_norm_eps=1e-6, rope_theta=10000.0, sliding_window=4096,
             vocab_size=256000),
        dict(sliding_window=4096, window_layers=(True, False) * 13, attention_softcap=50.0,
             logit_softcap=30.0, tie_embeddings=True, local_rope_theta=None)),
    "gemma-3-1b-it": (
        dict(model_type="gemma3_text", attention_bias=False, attn_logit_softcapping=None,
             cache_implementation="hybrid", final_logit_softcapping=None, head_dim=256,
             hidden_activation="gelu_pytorch_tanh", hidden_size=1152, intermediate_size=6912,
             max_position_embeddings=32768, num_attention_heads=4, num_hidden_layers=26,
             num_key_value_heads=1, query_pre_attn_scalar=256, rms_norm_eps=1e-6,
             rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512,
             sliding_window_pattern=6, vocab_size=262144),
        dict(window_layers=((True,) * 5 + (False,)) * 4 + (True, True), rope_theta=1e6,
             local_rope_theta=1e4, qk_norm=True, logit_softcap=None)),
    "gemma-3-4b-it": (
        dict(model_type="gemma3", mm_tokens_per_image=256, vision_config={"hidden_size": 1152},
             text_config=dict(hidden_size=2560, intermediate_size=10240, model_type="gemma3_text",
                              num_hidden_layers=34, sliding_window=1024,
                              rope_scaling={"factor": 8.0, "rope_type": "linear"})),
        dict(vocab_size=262208, num_heads=8, num_kv_heads=4, head_dim=256, sliding_window=1024,
             rope_scaling=rope.Scaling("linear", 8.0), rope_theta=1e6, local_rope_theta=1e4)),
}

# As they stand in the published folders, every key.
_WHOLE = {
    "Qwen3-4B": (
        dict(architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
             bos_token_id=151643, eos_token_id=151645, head_dim=128, hidden_act="silu",
             hidden_size=2560, initializer_range=0.02, intermediate_size=9728,
             max_position_embeddings=40960, max_window_layers=36, model_type="qwen3",
             num_attention_heads=32, num_hidden_layers=36, num_key_value_heads=8, rms_norm_eps=1e-06,
             rope_scaling=None, rope_theta=1000000, sliding_window=None, tie_word_embeddings=True,
             torch_dtype="bfloat16", transformers_version="4.51.0", use_cache=True,
             use_sliding_window=False, vocab_size=151936),
        dict(num_layers=36, qk_norm=True, max_position_embeddings=40960, tie_embeddings=True)),
    "SmolLM2-135M-Instruct": (
        dict(architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
             bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=576,
             initializer_range=0.041666666666666664, intermediate_size=1536, is_llama_config=True,
             max_position_embeddings=8192, mlp_bias=False, model_type="llama", num_attention_heads=9,
             num_hidden_layers=30, num_key_value_heads=3, pad_token_id=2, pretraining_tp=1,
             rms_norm_eps=1e-05, rope_interleaved=False, rope_scaling=None, rope_theta=100000,
             tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.42.3",
             use_cache=True, vocab_size=49152,
             **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}}),
        dict(head_dim=64, num_kv_heads=3, rope_theta=1e5, max_position_embeddings=8192)),
    "SmolLM2-1.7B-Instruct": (
        dict(architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
             bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=2048,
             initializer_range=0.02, intermediate_size=8192, max_position_embeddings=8192,
             mlp_bias=False, model_type="llama", num_attention_heads=32, num_hidden_layers=24,
             num_key_value_heads=32, pad_token_id=2, pretraining_tp=1, rms_norm_eps=1e-05,
             rope_scaling=None, rope_theta=130000, tie_word_embeddings=True, torch_dtype="bfloat16",
             transformers_version="4.42.3", use_cache=True, vocab_size=49152,
             **{"transformers.js_config": {
                 "dtype": "q4", "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"},
                 "use_external_data_format": {"model.onnx": True, "model_fp16.onnx": True}}}),
        dict(num_kv_heads=32, rope_theta=1.3e5, max_position_embeddings=8192)),
    "Llama-3.2-3B-Instruct": (
        dict(architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
             bos_token_id=128000, eos_token_id=[128001, 128008, 128009], head_dim=128,
             hidden_act="silu", hidden_size=3072, initializer_range=0.02, intermediate_size=8192,
             max_position_embeddings=131072, mlp_bias=False, model_type="llama",
             num_attention_heads=24, num_hidden_layers=28, num_key_value_heads=8, pretraining_tp=1,
             rms_norm_eps=1e-05, rope_theta=500000.0, tie_word_embeddings=True,
             rope_scaling={"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                           "original_max_position_embeddings": 8192, "rope_type": "llama3"},
             torch_dtype="bfloat16", transformers_version="4.45.0.dev0", use_cache=True,
             vocab_size=128256),
        dict(head_dim=128, max_position_embeddings=131072)),
    "Mistral-7B-Instruct-v0.3": (
        dict(architectures=["MistralForCausalLM"], attention_dropout=0.0, bos_token_id=1,
             eos_token_id=2, hidden_act="silu", hidden_size=4096, initializer_range=0.02,
             intermediate_size=14336, max_position_embeddings=32768, model_type="mistral",
             num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05,
             rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False,
             torch_dtype="bfloat16", transformers_version="4.42.0.dev0", use_cache=True,
             vocab_size=32768),
        dict(sliding_window=None, tie_embeddings=False, max_position_embeddings=32768)),
    "gemma-2-9b-it": (
        dict(architectures=["Gemma2ForCausalLM"], attention_bias=False, attention_dropout=0.0,
             attn_logit_softcapping=50.0, bos_token_id=2, cache_implementation="hybrid",
             eos_token_id=1, final_logit_softcapping=30.0, head_dim=256,
             hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", hidden_size=3584,
             initializer_range=0.02, intermediate_size=14336, max_position_embeddings=8192,
             model_type="gemma2", num_attention_heads=16, num_hidden_layers=42, num_key_value_heads=8,
             pad_token_id=0, query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_theta=10000.0,
             sliding_window=4096, sliding_window_size=4096, torch_dtype="bfloat16",
             transformers_version="4.42.0.dev0", use_cache=True, vocab_size=256000),
        dict(sliding_window=4096, window_layers=(True, False) * 21, attention_softcap=50.0)),
    "gemma-3-270m": (
        dict(_sliding_window_pattern=6, architectures=["Gemma3ForCausalLM"], attention_bias=False,
             attention_dropout=0.0, attn_logit_softcapping=None, bos_token_id=2, eos_token_id=1,
             final_logit_softcapping=None, head_dim=256, hidden_activation="gelu_pytorch_tanh",
             hidden_size=640, initializer_range=0.02, intermediate_size=2048,
             layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
             max_position_embeddings=32768, model_type="gemma3_text", num_attention_heads=4,
             num_hidden_layers=18, num_key_value_heads=1, pad_token_id=0, query_pre_attn_scalar=256,
             rms_norm_eps=1e-06, rope_local_base_freq=10000.0, rope_scaling=None, rope_theta=1000000.0,
             sliding_window=512, torch_dtype="bfloat16", transformers_version="4.55.0.dev0",
             use_bidirectional_attention=False, use_cache=True, vocab_size=262144),
        dict(sliding_window=512, window_layers=((True,) * 5 + (False,)) * 3, rope_theta=1e6,
             local_rope_theta=1e4, max_position_embeddings=32768)),
}

PUBLISHED = _SHORT | _WHOLE

# Every key that `to_dict` of transformers 4's LlamaConfig has, as trainers write it; the keys from
# _flash_attn_2_enabled on are theirs. Settings of generation are not at their defaults.
DUMPED = dict(
    return_dict=True, output_hidden_states=False, output_attentions=False, torchscript=False,
    torch_dtype="bfloat16", use_bfloat16=False, tf_legacy_loss=False, pruned_heads={},
    tie_word_embeddings=False, chunk_size_feed_forward=0, is_encoder_decoder=False, is_decoder=False,
    cross_attention_hidden_size=None, add_cross_attention=False, tie_encoder_decoder=False,
    max_length=20, min_length=1, do_sample=True, early_stopping=True, num_beams=4, num_beam_groups=2,
    diversity_penalty=0.5, temperature=0.6, top_k=50, top_p=0.9, typical_p=0.8,
    repetition_penalty=1.1, length_penalty=1.0, no_repeat_ngram_size=3, encoder_no_repeat_ngram_size=3,
    bad_words_ids=[[7]], num_return_sequences=1, output_scores=True, return_dict_in_generate=True,
    forced_bos_token_id=5, forced_eos_token_id=2, remove_invalid_values=True,
    exponential_decay_length_penalty=[5, 1.1], suppress_tokens=[3], begin_suppress_tokens=[4],
    architectures=["LlamaForCausalLM"], finetuning_task="sft", id2label={"0": "LABEL_0", "1": "LABEL_1"},
    label2id={"LABEL_0": 0, "LABEL_1": 1}, tokenizer_class="LlamaTokenizer", prefix="Hello.",
    bos_token_id=1, pad_token_id=0, eos_token_id=2, sep_token_id=6, decoder_start_token_id=1,
    task_specific_params=None, problem_type=None, _name_or_path="meta-llama/Llama-2-7b-hf",
    _attn_implementation_autoset=True, transformers_version="4.49.0", model_type="llama",
    vocab_size=32000, max_position_embeddings=4096, hidden_size=4096, intermediate_size=11008,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, hidden_act="silu",
    initializer_range=0.02, rms_norm_eps=1e-05, pretraining_tp=1, use_cache=True, rope_theta=10000.0,
    rope_scaling=None, attention_bias=False, attention_dropout=0.0, mlp_bias=False, head_dim=128,
    _flash_attn_2_enabled=True, neftune_noise_alpha=5.0, max_sequence_length=4096,
)
