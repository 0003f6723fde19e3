"""Every parameter of a decoder and the tensor or tensors of a Hugging Face file that it is made of.

PyTorch stores a projection as [out, in] and one tensor per layer; our trees hold [in, out] and all layers in one leaf
with a leading layer axis.
"""

import dataclasses

from jaxagentrl.models import decoder


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf of our tree and the tensor or tensors of theirs that it is made of."""

    path: tuple[str, ...]
    tensor: str                  # with "{layer}" when there is one per layer
    shape: tuple[int, ...]       # of one tensor, as stored in the file
    transposed: bool

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.tensor

    def leaf_shape(self, config: decoder.DecoderConfig) -> tuple[int, ...]:
        shape = self.shape[::-1] if self.transposed else self.shape
        return (config.num_layers, *shape) if self.per_layer else shape

    def tensors(self, config: decoder.DecoderConfig) -> list[str]:
        if not self.per_layer:
            return [self.tensor]
        return [self.tensor.format(layer=layer) for layer in range(config.num_layers)]


def of(config: decoder.DecoderConfig) -> list[Entry]:
    """Every parameter of the decoder, in the order of the forward pass."""
    width, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    layer = "model.layers.{layer}"

    def norm(ours: str, theirs: str) -> Entry:
        return Entry(("layers", ours, "scale"), f"{layer}.{theirs}.weight", (width,), False)

    entries = [
        Entry(("embed", "embedding"), "model.embed_tokens.weight", (vocab, width), False),
        norm("attention_norm", "input_layernorm"),
    ]
    for name, size in (("q", queries), ("k", keys), ("v", keys)):
        path, tensor = ("layers", "attention", name), f"{layer}.self_attn.{name}_proj"
        entries.append(Entry((*path, "kernel"), f"{tensor}.weight", (size, width), True))
        if config.attention_bias:
            entries.append(Entry((*path, "bias"), f"{tensor}.bias", (size,), False))
    if config.qk_norm:
        entries += [
            Entry(("layers", "attention", f"{name}_norm", "scale"),
                   f"{layer}.self_attn.{name}_norm.weight", (config.head_dim,), False)
            for name in ("q", "k")
        ]
    entries.append(Entry(("layers", "attention", "o", "kernel"),
                          f"{layer}.self_attn.o_proj.weight", (width, queries), True))
    # The name that is given to the norm before the feed-forward is, with norms on both sides, that
    # of the one after attention.
    if config.post_norms:
        entries += [norm("post_attention_norm", "post_attention_layernorm"),
                    norm("mlp_norm", "pre_feedforward_layernorm")]
    else:
        entries.append(norm("mlp_norm", "post_attention_layernorm"))
    for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
        entries.append(Entry(("layers", "mlp", name, "kernel"), f"{layer}.mlp.{name}_proj.weight",
                              shape, True))
    if config.post_norms:
        entries.append(norm("post_mlp_norm", "post_feedforward_layernorm"))
    entries.append(Entry(("final_norm", "scale"), "model.norm.weight", (width,), False))
    if not config.tie_embeddings:
        entries.append(Entry(("lm_head", "kernel"), "lm_head.weight", (vocab, width), True))
    return entries
