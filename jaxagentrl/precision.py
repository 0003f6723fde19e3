"""float32 that is float32 on accelerators, too."""

import jax


def keep_float32() -> None:
    """Products of float32 arrays keep all their bits from here on, in the whole process.

    By default GPUs round what they multiply to 10 bits (TF32) and TPUs to 8, and the sampler and the
    scoring pass, whose products have other shapes, then differ by 4e-3 instead of 1e-5 (an H200,
    `docs/performance.md`). Products of bfloat16 arrays are as fast as before.
    """
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "float32")
