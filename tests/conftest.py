"""Suite-wide settings: four fake CPU devices and no silent rank promotion."""

import os

# Read by XLA when its backend starts, hence before any import of jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
