"""Small random models of transformers, one for every family and setting that we claim to read."""

import numpy as np
import torch
import transformers

SIZES = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=56, max_position_embeddings=40_960)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 512, "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024,
        "rope_theta": 1e6}
PLAIN = {"rope_type": "default", "rope_theta": 5e4}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
WINDOW = ["full_attention", "sliding_attention", "sliding_attention"]
GEMMA = dict(head_dim=8, sliding_window=5, query_pre_attn_scalar=12, pad_token_id=0)

CASES = {
    "llama_tied": (transformers.LlamaConfig, dict(tie_word_embeddings=True)),
    "llama_untied": (transformers.LlamaConfig, dict(tie_word_embeddings=False, head_dim=16)),
    "llama_3": (transformers.LlamaConfig, dict(tie_word_embeddings=True, head_dim=16,
                                               rope_parameters=LLAMA3)),
    "mistral": (transformers.MistralConfig, dict(sliding_window=None, head_dim=16)),
    "mistral_window": (transformers.MistralConfig, dict(sliding_window=5)),
    "qwen2_tied": (transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen2_untied": (transformers.Qwen2Config, dict(head_dim=16, rope_parameters=YARN)),
    "qwen2_windows": (transformers.Qwen2Config, dict(use_sliding_window=True, sliding_window=5,
                                                     max_window_layers=1)),
    "qwen3": (transformers.Qwen3Config, dict(tie_word_embeddings=True, head_dim=16)),
    "qwen3_windows": (transformers.Qwen3Config, dict(head_dim=8, use_sliding_window=True,
                                                     sliding_window=5, layer_types=WINDOW)),
    "gemma2": (transformers.Gemma2Config, dict(GEMMA, attn_logit_softcapping=2.0,
                                               final_logit_softcapping=5.0)),
    "gemma2_no_caps": (transformers.Gemma2Config, dict(
        GEMMA, layer_types=WINDOW, attn_logit_softcapping=None, final_logit_softcapping=None)),
    "gemma3": (transformers.Gemma3TextConfig, dict(GEMMA, layer_types=WINDOW, rope_parameters={
        "full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    })),
    "gemma3_seven": (transformers.Gemma3TextConfig, dict(
        GEMMA, num_hidden_layers=7, final_logit_softcapping=4.0)),
}


def make(case: str, seed: int = 0, **changes):
    """A random model; norms and biases too, else their place is untested."""
    config_class, options = CASES[case]
    settings = {"rope_parameters": dict(PLAIN), **SIZES, **options, **changes}
    if config_class is transformers.Gemma3TextConfig and "rope_parameters" not in options:
        del settings["rope_parameters"]
    torch.manual_seed(seed)
    config = config_class(**{key: _copy(value) for key, value in settings.items()})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)   # the initial 0.02 gives logits too small to tell errors apart
    return model.eval()


def logits(model, tokens: np.ndarray, **inputs) -> np.ndarray:
    with torch.no_grad():
        inputs = {name: torch.tensor(value) if isinstance(value, np.ndarray) else value
                  for name, value in inputs.items()}
        return model(torch.tensor(tokens, dtype=torch.long), **inputs).logits.numpy()


def _copy(value):
    return {key: _copy(inner) for key, inner in value.items()} if isinstance(value, dict) else value
