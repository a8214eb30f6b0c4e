"""The one decoder: embedding, scanned layers, final norm; every family is a DecoderConfig of it.

A decoder is an nnx container. Training splits it once, `nnx.split(decoder, nnx.Param, ...)`, into what is trained (LoRA
and modules_to_save) and what is frozen, and merges the two again inside the compiled step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fastft_jax.models.attention import Attention, KVCache, Sequence
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.latent_attention import LatentAttention
from fastft_jax.models.layers import Embedding, ExpertLinear, LayerNorm, Linear, RMSNorm, drop, make_norm
from fastft_jax.models.mlp import GatedMLP, PlainMLP
from fastft_jax.models.moe import MixtureOfExperts
from fastft_jax.models.remat import LAYER_INPUT, Policy
from fastft_jax.models.residuals import Keep, Slot
from fastft_jax.models.rope import rope_tables
from fastft_jax.models.stack import run_layers
from fastft_jax.quant.dense import is_quantised
from fastft_jax.quant.lora_linear import contract

# path inside a layer or the decoder, its shape, the layers to stack (None: not in a layer) -> array or quantised array
LoadFn = Callable[[str, tuple[int, ...], tuple[int, ...] | None], Any]

HEAD_BIAS_COLUMNS = 8  # one, and zeros: GEMMs want widths in multiples of 16 bytes
DROPOUT_KEYS_A_LAYER = 8  # one for each linear: four in attention, three in the MLP, a fifth in latent attention


class Loader(NamedTuple):
    """Asks a LoadFn for the tensors of one place in the decoder."""

    fn: LoadFn
    layers: tuple[int, ...] | None = None

    def __call__(self, path: str, shape: tuple[int, ...]):
        return self.fn(path, shape, self.layers)

    def linear(self, path: str, n: int, k: int, bias: bool) -> Linear:
        return Linear(self(f"{path}.weight", (n, k)), self(f"{path}.bias", (n,)) if bias else None)

    def experts(self, path: str, e: int, n: int, k: int, bias: bool = False) -> ExpertLinear:
        weight = self(f"{path}.weight", (e, n, k))
        return ExpertLinear(weight, e, self(f"{path}.bias", (e, n)) if bias else None)


class DecoderLayer(nnx.Module):
    """`h = x + attention(norm(x)); y = h + mlp(norm(h))`, or with the norms elsewhere.

    block "pre" is that; "post" `h = x + norm(attention(x))` and so on; "sandwich" has both; "parallel" is
    `y = x + attention(norm(x)) + mlp(norm(x))` with one norm.
    """

    def __init__(self, config: DecoderConfig, load: Loader):
        before, after = config.block != "post", config.block in ("post", "sandwich")
        self.parallel, self.residual_multiplier = config.block == "parallel", config.residual_multiplier

        def norm(path: str, present: bool) -> RMSNorm | LayerNorm | None:
            return make_norm(config, load, path, config.hidden_size) if present else None

        self.input_layernorm = norm("input_layernorm", before)
        kind = config.layer_kinds[load.layers[0]]
        self.self_attn = (Attention if config.latent is None else LatentAttention)(config, load, kind)
        self.attention_output_norm = norm("attention_output_norm", after)
        self.post_attention_layernorm = norm("post_attention_layernorm", before and not self.parallel)
        mlp = MixtureOfExperts if kind.sparse else GatedMLP if config.gated_mlp else PlainMLP
        self.mlp = mlp(config, load)
        self.mlp_output_norm = norm("mlp_output_norm", after)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        seq: Sequence,
        cache: KVCache | None = None,
        key: Array | None = None,
        keep: Keep | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Float[Array, "2 E"] | None]:
        """The layer's output, the cache with this call's keys and values, and its router's load (see Sequence)."""
        keys = None if key is None else jax.random.split(key, DROPOUT_KEYS_A_LAYER)
        attention_keys, mlp_keys = (None, None) if keys is None else (keys[jnp.array([0, 1, 2, 3, 7])], keys[4:7])
        keep = Keep() if keep is None else keep
        if self.parallel:
            normed = self.input_layernorm(x)
            with jax.named_scope("attention"):
                out, _, cache = self.self_attn(Slot(normed), None, seq, keep, cache, attention_keys)
            x = self._add(x, out)
            with jax.named_scope("mlp"):
                out, _, load = self._feed_forward(Slot(normed), None, seq, keep, mlp_keys)
            return self._add(x, out), cache, load
        with jax.named_scope("attention"):
            out, x, cache = self.self_attn(keep.input(x), self.input_layernorm, seq, keep, cache, attention_keys)
            if self.attention_output_norm is not None:
                out = self.attention_output_norm(keep("block_out", out))
        middle = keep.shared_slot("mid_residual", self._add(x, out))
        with jax.named_scope("mlp"):
            out, x, load = self._feed_forward(middle, self.post_attention_layernorm, seq, keep, mlp_keys)
            if self.mlp_output_norm is not None:
                out = self.mlp_output_norm(keep("block_out", out))
        return self._add(x, out), cache, load

    def _feed_forward(self, x, norm, seq: Sequence, keep: Keep, keys: Array | None):
        """The output, x for the residual connection, and the router's load if there is a router."""
        if isinstance(self.mlp, MixtureOfExperts):
            return self.mlp(x, norm, keep, keys, seq.counted)
        return *self.mlp(x, norm, keep, keys), None

    def _add(self, x: Float[Array, "B T D"], out: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.residual_multiplier == 1.0:
            return x + out
        # the multiplier itself is not rounded to a 16-bit dtype, as in torch
        return x + (out.astype(jnp.float32) * self.residual_multiplier).astype(out.dtype)


class Decoder(nnx.Module):
    """A causal language model without its loss. `segments[s][p]` holds the stacked layers of one place."""

    def __init__(self, config: DecoderConfig, load: LoadFn, dtype):
        self.config, self.dtype = config, dtype
        top = Loader(load)
        self.embed_tokens = Embedding(top("embed_tokens.weight", (config.vocab_size, config.hidden_size)))
        self.segments = nnx.List(
            nnx.List(DecoderLayer(config, Loader(load, layers)) for layers in segment) for segment in config.segments
        )
        self.norm = make_norm(config, top, "norm", config.hidden_size)
        tied = config.tie_word_embeddings
        head = None if tied else top.linear("lm_head", config.vocab_size, config.hidden_size, config.head_bias)
        self.lm_head = nnx.data(head)  # a tied head is None, until modules_to_save unties it

    def hidden_states(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        max_segments: int | None = None,
        max_document_length: int | None = None,
        policy: str | Policy = "none",
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states, after the last norm, in the compute dtype.

        segment_ids 0 marks padding, which is never attended to; equal ids in a row are one document, and documents do
        not see each other. max_segments and max_document_length bound them, for kernels that want to know (static).
        positions default to 0..T-1. `policy` names what the backward pass recomputes.
        """
        return self.hidden_states_and_load(
            input_ids,
            positions,
            segment_ids,
            None,
            max_segments=max_segments,
            max_document_length=max_document_length,
            policy=policy,
            dropout_key=dropout_key,
        )[0]

    def hidden_states_and_load(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"] | None,
        counted: Bool[Array, "B T"] | None,
        *,
        max_segments: int | None = None,
        max_document_length: int | None = None,
        policy: str | Policy = "none",
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "2 E"] | None]:
        """`hidden_states`, and `router_load` summed over the sparse layers, of the `counted` tokens, if any."""
        x, tables = self._start(input_ids, positions)
        seq = Sequence(tables, segment_ids, max_segments, max_document_length)
        loads = []
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.config.num_hidden_layers)
        for segment, layers in zip(self.segments, self.config.segments, strict=True):
            stack = _Stack.of(segment)
            picked = None if keys is None else [keys[jnp.array(rows)] for rows in layers]
            arrays = (seq.tables, seq.segment_ids, counted)

            def layer(x, trainable, frozen, index, keep, stack=stack):
                (tables, segment_ids, counted), keys, frozen = frozen
                here = seq._replace(tables=tables, segment_ids=segment_ids, counted=counted)
                added = None
                for p, block in enumerate(stack.layers(trainable, frozen, index)):
                    x = x if p == 0 else keep(LAYER_INPUT, x)  # the loop itself keeps the first one's
                    x, _, load = block(x, here, None, None if keys is None else keys[p][index], keep)
                    added = load if added is None else added if load is None else added + load
                return x, added

            x, load = run_layers(layer, len(layers[0]), policy, x, stack.trainable, (arrays, picked, stack.frozen))
            loads += [] if load is None else [load]
        return self.norm(x), sum(loads) if loads else None

    def map_layers(
        self,
        fn: Callable[[Float[Array, "B T D"]], Array],
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Array:
        """`fn` of the embedding's output and of every layer's, stacked [L + 1, ...]: for looking inside."""
        x, tables = self._start(input_ids, positions)
        seq = Sequence(tables, segment_ids)
        seen = [fn(x)[None]]
        for segment in self.segments:
            stack = _Stack.of(segment)

            def body(x, xs, stack=stack):
                outputs = []
                for layer in stack.layers(xs[1], stack.frozen, xs[0]):
                    x, *_ = layer(x, seq)
                    outputs.append(fn(x))
                return x, jnp.stack(outputs)

            x, outputs = jax.lax.scan(body, x, (jnp.arange(stack.count), stack.trainable))
            seen.append(outputs.reshape(-1, *outputs.shape[2:]))
        return jnp.concatenate(seen)

    def decode(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        kv_segment_ids: Int[Array, "B S"],
        q_offset: Int[Array, ""] | int,
        caches: list[list[KVCache]],
    ) -> tuple[Float[Array, "B T D"], list[list[KVCache]]]:
        """Hidden states of new tokens that follow `q_offset` cached ones, and the caches with the new ones written.

        kv_segment_ids is 1 where the cache holds (or receives) a token that may be attended to, 0 elsewhere.
        """
        x, tables = self._start(input_ids, positions)
        seq = Sequence(tables, segment_ids, kv_segment_ids=kv_segment_ids, q_offset=q_offset)
        new = []
        for segment, segment_caches in zip(self.segments, caches, strict=True):
            stack = _Stack.of(segment)

            def body(x, xs, stack=stack):
                index, trainable, layer_caches = xs
                written = []
                for layer, cache in zip(stack.layers(trainable, stack.frozen, index), layer_caches, strict=True):
                    x, cache, _ = layer(x, seq, cache)
                    written.append(cache)
                return x, written

            x, written = jax.lax.scan(body, x, (jnp.arange(stack.count), stack.trainable, segment_caches))
            new.append(written)
        return self.norm(x), new

    def head_weight(self) -> Float[Array, "V D"]:
        """The matrix that turns hidden states into logits (the embedding itself when tied)."""
        return self.head_variable().get_value()

    def head_variable(self) -> nnx.Variable:
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight

    @property
    def trains_head(self) -> bool:
        """Does a gradient flow into the head's matrix, or into the LoRA pair beside it?"""
        return isinstance(self.head_variable(), nnx.Param) or self._head_adapter is not None

    @property
    def _head_adapter(self) -> Linear | None:
        return self.lm_head if self.lm_head is not None and self.lm_head.adapted else None

    @property
    def _tied_tokens(self) -> Embedding | None:
        """The embedding, where it has trained rows and is the head, too."""
        return self.embed_tokens if self.lm_head is None and self.embed_tokens.tokens is not None else None

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """float32 logits of every position given."""
        weight = self.head_weight().astype(hidden.dtype)
        logits = jnp.einsum("BTD,VD->BTV", hidden, weight, preferred_element_type=jnp.float32)
        if (head := self._head_adapter) is not None:
            h = contract(hidden, head.lora_A.get_value().astype(hidden.dtype), 2, 1, hidden.dtype)
            logits = logits + contract(h, head_columns(head, hidden.dtype), 2, 1, jnp.float32)
        if (embedding := self._tied_tokens) is not None:
            own = contract(hidden, embedding.tokens.get_value().astype(hidden.dtype), 2, 1, jnp.float32)
            logits = logits.at[..., jnp.array(embedding.token_rows)].set(own)
        if self.config.head_bias:
            logits = logits + self.lm_head.bias.get_value().astype(jnp.float32)
        scale, cap = self.config.logit_scale, self.config.final_softcap
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def head_product(
        self, hidden: Float[Array, "M D"], dropout_key: Array | None = None
    ) -> tuple[Float[Array, "M K"], Float[Array, "V K"]]:
        """Two factors whose product is the logits before scale and cap; a head's bias is a column more, and the columns
        of a LoRA pair on it come next: its gradient is rounded to the head's dtype once. Trained rows of a tied head
        are such a pair, too: what they differ by, and a column of zeros with a one for each."""
        weight = self.head_weight()
        if (head := self._head_adapter) is not None:
            dropped = hidden if dropout_key is None else drop(hidden, head.dropout, dropout_key)
            h = contract(dropped, head.lora_A.get_value().astype(hidden.dtype), 1, 1, hidden.dtype)
            hidden, weight = _with_columns(hidden, weight, h, head_columns(head, weight.dtype))
        if (embedding := self._tied_tokens) is not None:
            rows, own = jnp.array(embedding.token_rows), embedding.tokens.get_value()
            change = (own - weight[rows].astype(own.dtype)).astype(hidden.dtype)
            columns = jnp.zeros((weight.shape[0], rows.size), weight.dtype).at[rows, jnp.arange(rows.size)].set(1)
            hidden, weight = _with_columns(hidden, weight, contract(hidden, change, 1, 1, hidden.dtype), columns)
        if not self.config.head_bias:
            return hidden, weight
        more = ((0, 0), (0, HEAD_BIAS_COLUMNS))
        hidden = jnp.pad(hidden, more).at[:, hidden.shape[1]].set(1)
        return hidden, jnp.pad(weight, more).at[:, weight.shape[1]].set(self.lm_head.bias.get_value())

    def empty_caches(self, batch: int, length: int) -> list[list[KVCache]]:
        """Zeroed caches for `length` tokens, stacked as the layers are: k and v [L, B, S, K, H], each its own H."""
        c = self.config

        def empty(layers: tuple[int, ...]) -> KVCache:
            shape = (len(layers), batch, length, c.num_key_value_heads)
            return KVCache(*(jnp.zeros((*shape, width), self.dtype) for width in (c.head_dim, c.value_dim)))

        return [[empty(layers) for layers in segment] for segment in c.segments]

    def _start(self, input_ids, positions):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        x = self.embed_tokens(input_ids, self.dtype)
        if self.config.embedding_scale is not None:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        return x, tuple(rope_tables(rope, self.config.rope_dim, positions) for rope in self.config.ropes)


def _with_columns(
    hidden: Float[Array, "M D"], weight: Float[Array, "V D"], h: Float[Array, "M R"], columns: Float[Array, "V R"]
) -> tuple[Float[Array, "M K"], Float[Array, "V K"]]:
    """The factors of `hidden weight^T + h columns^T`."""
    more = ((0, 0), (0, -h.shape[1] % HEAD_BIAS_COLUMNS))
    return (
        jnp.concatenate([hidden, jnp.pad(h, more)], axis=1),
        jnp.concatenate([weight, jnp.pad(columns, more)], axis=1),
    )


def head_columns(head: Linear, dtype) -> Float[Array, "V R"]:
    """scaling * B, in `dtype`."""
    return (head.lora_B.get_value() * head.scaling).astype(dtype)


class _Stack(NamedTuple):
    """The places of a segment taken apart for a loop over its layers."""

    count: int
    definitions: list
    trainable: list  # stacked leaves, of which the loop takes one slice each
    frozen: list  # stacked leaves, read at the loop's index: NF4 codes where they lie

    @classmethod
    def of(cls, segment: nnx.List) -> "_Stack":
        definitions, trainable, frozen = [], [], []
        for place in segment:
            place = nnx.merge(*nnx.split(place))  # own containers, same arrays: expand() must not reach the caller's
            rows = jax.tree.leaves(place.self_attn.o_proj.weight.get_value())[0].shape[0]
            for _, module in nnx.iter_modules(place):
                if isinstance(module, Linear):
                    module.expand(rows)
            for part, value in zip((definitions, trainable, frozen), nnx.split(place, nnx.Param, ...), strict=True):
                part.append(value)
        return cls(rows, definitions, trainable, frozen)

    def layers(self, trainable: list, frozen: list, index: Array) -> list[DecoderLayer]:
        """The layers of one turn of the loop."""

        def pick(leaf):
            if is_quantised(leaf):
                return leaf.at(index)
            row = leaf[index]
            if row.ndim == 1 and jnp.issubdtype(row.dtype, jnp.floating):
                # A norm's weight or a bias. In their own dtype XLA would fetch these few kB by asynchronous copies, and
                # queue those behind copies to the host, of 70 MB; a cast is a kernel, which runs at once.
                row = row.astype(jnp.float32)
            return row

        here = jax.tree.map(pick, frozen, is_leaf=is_quantised)
        return [nnx.merge(*parts) for parts in zip(self.definitions, trainable, here, strict=True)]
