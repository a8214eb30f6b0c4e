"""What a decoder is: every number and switch that changes its maths, as data.

Axes, everywhere in this project: B batch, T query position, S key position, D model width, N query heads, K key/value
heads, H head width, F feed-forward width, V vocabulary, R LoRA rank, L layers, E experts, G quantisation blocks.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding frequencies and their scaling; field names as in Hugging Face's `rope_parameters`.

    rope_type "none", which no file says, is no rotation at all. partial_rotary_factor is the share of each head's
    elements, the first ones, that is rotated.
    """

    rope_theta: float = 10_000.0
    rope_type: str = "default"
    max_position_embeddings: int = 2048
    original_max_position_embeddings: int | None = None
    factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial_rotary_factor: float = 1.0

    def rotary_dim(self, head_dim: int) -> int:
        """How many elements of a head are rotated."""
        return int(head_dim * self.partial_rotary_factor)


@dataclass(frozen=True)
class ExpertsConfig:
    """Feed-forward layers of E experts, of which a router picks `top_k` for each token.

    router "softmax": the top_k largest of softmax(logits), divided by their sum if `normalise`; "sigmoid": the same of
    sigmoid(logits), where a learned bias joins in the choice; "sparsemixer": see models/router.py. With several
    `groups` of experts, side by side, only those of a token's best `top_groups` are chosen from. A shared expert, if
    there is one, serves every token.
    """

    num_experts: int
    top_k: int
    intermediate_size: int  # of one expert
    router: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    normalise: bool = True
    groups: int = 1
    top_groups: int = 1
    shared_gate: bool = True  # a sigmoid gate on the shared expert, where there is one
    scaling: float = 1.0  # of the routed experts' weights
    float32_logits: bool = False  # the router's; else they are rounded to the compute dtype
    router_epsilon: float = 0.0  # of "sparsemixer": how far from the best score another one may be
    shared_intermediate_size: int | None = None
    bias: bool = False  # of the experts' linears, and of the router
    dense_layers: tuple[int, ...] = ()  # those with a plain feed-forward layer instead
    aux_loss_coef: float | None = None  # of the load-balancing loss; None: it is not added


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention: keys and values of all heads are expanded from `kv_rank` numbers a token.

    A query or key head is `nope_dim` elements without rotation and `rope_dim` rotated ones, which for keys all heads
    share; a value head has `value_dim`. Queries come from `q_rank` numbers a token, or (None) from the input itself.
    """

    kv_rank: int
    q_rank: int | None
    nope_dim: int
    rope_dim: int
    value_dim: int


class LayerKind(NamedTuple):
    """What may differ between the layers of one decoder; layers of one kind can be stacked."""

    window: int | None
    rope: int  # index into DecoderConfig.ropes
    sparse: bool = False  # with experts


@dataclass(frozen=True)
class DecoderConfig:
    """One decoder-only language model; a family is a function from `config.json` to this."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    layer_windows: tuple[int | None, ...]  # one a layer: the sliding window in tokens, None for full attention
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None  # RMSNorm of q and k: of every head, or of all heads at once
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"  # rms_plus_one: the factor is 1 + w, in float32
    norm_bias: bool = False  # of norm "layer"
    block: Literal["pre", "post", "sandwich", "parallel"] = "pre"  # where the norms stand: see DecoderLayer
    activation: Literal["silu", "gelu_tanh", "gelu", "clamped_silu"] = "silu"
    gated_mlp: bool = True  # without a gate: down(act(up(x)))
    head_bias: bool = False
    fused_projections: bool = False  # one linear for q, k and v, and one for gate and up
    grouped_qkv: bool = False  # one linear for q, k and v: of each key head its queries, then it, then its value
    fused_gate_up: bool = False  # one linear for gate and up, in experts, too
    embedding_scale: float | None = None  # rounded to the compute dtype, then multiplied
    residual_multiplier: float = 1.0  # of what a block adds to the residual stream
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    attention_sinks: bool = False  # a learned logit a head, in the softmax's denominator only
    final_softcap: float | None = None
    logit_scale: float = 1.0
    rope_interleaved: bool = False  # rotation pairs even and odd elements, not the two halves
    second_rope: RopeConfig | None = None
    second_rope_layers: tuple[int, ...] = ()  # the layers that rotate by second_rope
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None  # latent attention; head_dim is then that of queries and keys
    unread_layers: int = 0  # layers behind the last that a checkpoint may hold, for other ends than this decoder's

    @property
    def rope_dim(self) -> int:
        """The width of what a rotation is made for: a head, or the rotated part of a latent attention's."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def value_dim(self) -> int:
        """The width of a value head."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different rotations; layer i uses number `layer_kinds[i].rope`."""
        return (self.rope,) if self.second_rope is None else (self.rope, self.second_rope)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        return tuple(
            LayerKind(w, int(i in self.second_rope_layers), self.is_sparse(i)) for i, w in enumerate(self.layer_windows)
        )

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's feed-forward part is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def segments(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Layers grouped for scanning: `segments[s][p]` are the layer indices at place p of segment s's pattern.

        Layers of one place share their static structure, so their weights are stacked and scanned; a segment is the
        shortest pattern that repeats, e.g. one segment ((0, 2, 4), (1, 3, 5)) for local/global attention in turn.
        """
        return plan_segments(self.layer_kinds)

    def place_of(self, layer: int) -> tuple[int, int, int]:
        """(segment, place in the pattern, row in the stack) of a layer index."""
        for s, segment in enumerate(self.segments):
            for p, layers in enumerate(segment):
                if layer in layers:
                    return s, p, layers.index(layer)
        raise IndexError(f"layer {layer} of {self.num_hidden_layers}")


def plan_segments(kinds: tuple) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Cut a sequence of layer kinds into segments, each a pattern repeated: greedily the longest, then the shortest."""
    segments, start = [], 0
    while start < len(kinds):
        rest = kinds[start:]
        covered, period = max(
            ((_repeats(rest, period) * period, period) for period in range(1, len(rest) + 1)),
            key=lambda option: (option[0] if option[1] == 1 or option[0] > option[1] else 0, -option[1]),
        )
        segments.append(tuple(tuple(range(start + p, start + covered, period)) for p in range(period)))
        start += covered
    return tuple(segments)


def _repeats(kinds: tuple, period: int) -> int:
    """How often the first `period` kinds repeat from the start."""
    n = 1
    while kinds[n * period : (n + 1) * period] == kinds[:period]:
        n += 1
    return n
