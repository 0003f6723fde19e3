"""The shape of a decoder: every family of models it can be is a choice of these settings."""

import dataclasses
import numbers
from typing import Any

from jaxagentrl.models import rope

ACTIVATIONS = ("silu", "gelu_tanh")

_NUMBERS: dict[Any, tuple[type, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
}
_NUMBERS |= {kind | None: expected for kind, expected in _NUMBERS.items()}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. Names follow the `config.json` of published checkpoints."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    attention_bias: bool = False
    rope_scaling: rope.Scaling | None = None
    qk_norm: bool = False  # RMSNorm of every query and key head before rotation
    activation: str = "silu"  # of the feed-forward gate: "silu" or "gelu_tanh"
    # A layer with a window sees that many tokens, its own included. None: no layer has one.
    sliding_window: int | None = None
    # For every layer whether it has the window; None: all have it.
    window_layers: tuple[bool, ...] | None = None
    # Rotation of the layers with a window, which then is not scaled. None: that of all layers.
    local_rope_theta: float | None = None
    norm_plus_one: bool = False  # norms multiply by 1 + scale
    post_norms: bool = False  # norms also after attention and feed-forward, before they are added
    scale_embeddings: bool = False  # embeddings times √hidden_size
    query_scale_dim: float | None = None  # attention scores are divided by its root; None: head_dim
    attention_softcap: float | None = None  # scores become cap · tanh(scores / cap)
    logit_softcap: float | None = None  # and so do logits
    # What follows changes no number, hence no program: configs that differ in it alone are equal.
    # The longest text that the model was made for; None: nobody said.
    max_position_embeddings: int | None = dataclasses.field(default=None, compare=False)
    # The family it was read as, which an export keeps to if it can.
    model_type: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type not in _NUMBERS or (value is None and field.type not in (int, float)):
                continue
            kind, expected = _NUMBERS[field.type]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"model.{field.name} must be {expected}, got {value!r}.")
            if not value > 0:
                raise ValueError(f"model.{field.name} must be positive, got {value!r}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads ({self.num_heads}) must be a multiple of model.num_kv_heads "
                f"({self.num_kv_heads}): every key/value head serves the same number of queries."
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim must be even for rotary positions, got {self.head_dim}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"model.activation must be one of {ACTIVATIONS}, got {self.activation!r}."
            )
        self._check_windows()

    def _check_windows(self) -> None:
        layers = self.window_layers
        if self.sliding_window is None:
            if layers is not None or self.local_rope_theta is not None:
                raise ValueError(
                    "model.window_layers and model.local_rope_theta say something of layers with a "
                    "window; give model.sliding_window or leave them None."
                )
            return
        wrong = layers is not None and (len(layers) != self.num_layers or len(set(layers)) < 2)
        if wrong:
            raise ValueError(
                f"model.window_layers must have one entry for each of the {self.num_layers} layers, "
                f"some True and some False (None means all True), got {layers}."
            )
        if self.local_rope_theta is not None and layers is None:
            raise ValueError(
                "model.local_rope_theta is for models whose layers differ: give "
                "model.window_layers, or set model.rope_theta."
            )

    @property
    def attention_scale(self) -> float:
        return (self.query_scale_dim or self.head_dim) ** -0.5
