"""float32 that is float32 on accelerators, too."""

import jax


def keep_float32(compute_dtype: str) -> None:
    """Has products of float32 arrays keep all their bits from here on, in the whole process, where the
    computation is to be in float32.

    By default GPUs round what they multiply to 10 bits (TF32) and TPUs to 8, and the sampler and the
    scoring pass, whose products have other shapes, drift apart: by 1e-4 instead of 1e-6 in a small model
    on an H200 (`docs/performance_log.md`).
    """
    if compute_dtype == "float32" and jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "float32")
