"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864) and their long-context scalings.

The pairs that rotate together are (i, i + E/2), the half-split convention of `transformers`.

Frequencies are made on the host, in the float32 steps in which published models were trained: at
position 30,000 one unit in the last place of a frequency is an angle of 1e-3.

B rows, L positions, E head size.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How a model stretches its positions beyond its training length. Names as in `config.json`.

    linear: every frequency is divided by `factor`.
    llama3: wavelengths beyond original / low_freq_factor are, those within original /
        high_freq_factor are not, between them it fades (Llama 3.1).
    yarn: by how often a frequency turns within the original length, from `beta_fast` turns (kept)
        to `beta_slow` (divided); cos and sin grow by `attention_factor` (Peng et al. 2023,
        https://arxiv.org/abs/2309.00071).
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None  # default 0.1 ln(factor) + 1
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in KINDS:
            raise ValueError(f"rope_type must be one of {KINDS}, got {self.rope_type!r}.")
        if not self.factor >= 1:
            raise ValueError(f"rope factor must be at least 1, got {self.factor}.")
        if self.rope_type != "linear" and not (self.original_max_position_embeddings or 0) > 0:
            raise ValueError(
                f"rope_type {self.rope_type!r} needs original_max_position_embeddings, got "
                f"{self.original_max_position_embeddings}."
            )
        if self.rope_type == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "llama3 needs low_freq_factor above 0 and below high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}."
            )
        if self.rope_type == "yarn" and not 0 < self.beta_slow <= self.beta_fast:
            raise ValueError(
                "yarn needs beta_slow above 0 and not above beta_fast, got "
                f"{self.beta_slow} and {self.beta_fast}."
            )


def frequencies(
    head_dim: int, theta: float, scaling: Scaling | None = None
) -> tuple[np.ndarray, float]:
    """Radians per position [E/2] float32, and the factor of cos and sin."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = (theta ** exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / powers
    if scaling is None:
        return plain, 1.0
    if scaling.rope_type == "linear":
        return plain / np.float32(scaling.factor), 1.0
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(powers, head_dim, theta, scaling)


def _llama3(plain: np.ndarray, scaling: Scaling) -> np.ndarray:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    wavelengths = (np.float32(1) / plain) * np.float32(2 * math.pi)
    stretched = np.where(wavelengths > original / low, plain / np.float32(scaling.factor), plain)
    turns = (np.float32(1) / wavelengths) * np.float32(original)
    smooth = (turns - np.float32(low)) / np.float32(high - low)
    faded = (1 - smooth) * stretched / np.float32(scaling.factor) + smooth * stretched
    between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return np.where(between, faded, stretched).astype(np.float32)


def _yarn(
    powers: np.ndarray, head_dim: int, theta: float, scaling: Scaling
) -> tuple[np.ndarray, float]:
    def dimension(turns: float) -> float:
        """Where a pair turns this often within the original length."""
        length = scaling.original_max_position_embeddings
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0.0
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = 1 - np.clip(ramp, 0, 1)
    stretched = np.float32(1) / (np.float32(scaling.factor) * powers)
    result = stretched * (1 - kept) + (np.float32(1) / powers) * kept
    attention = scaling.attention_factor
    if attention is None:
        attention = 0.1 * math.log(scaling.factor) + 1.0
    return result.astype(np.float32), attention


def tables(
    frequencies: np.ndarray, factor: float, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position · frequency, each [B, L, E/2] float32, for positions [B, L]."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies)[None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates [B, L, heads, E] by cos and sin [B, L, E/2]."""
    cos, sin = (part[:, :, None, :].astype(x.dtype) for part in table)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
