"""Every family at a size that kernels take (heads of 64 and more, 256 tokens), and three ways to compute its step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastft_jax import FastLanguageModel
from fastft_jax.bench.check import in_float32
from fastft_jax.bench.measure import Workload, on_device
from fastft_jax.bench.random_model import random_weights
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.examples import EXAMPLES
from fastft_jax.models.families.registry import config_from_hf
from fastft_jax.pallas_kernels import pallas
from fastft_jax.trainers.compile import compiler_options
from fastft_jax.trainers.step import LossOptions, gradients

VOCAB, TOKENS, WINDOW, LAYERS, EXPERTS = 512, 256, 64, 2, 8
SIZES = dict(hidden_size=256, intermediate_size=512, vocab_size=VOCAB, num_hidden_layers=LAYERS)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
LATENT = dict(num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=128, q_lora_rank=64)
LATENT |= dict(n_routed_experts=EXPERTS, moe_intermediate_size=128, n_group=4, topk_group=2, num_experts_per_tok=3)
LATENT |= dict(first_k_dense_replace=1)
LOCAL_GLOBAL = ["sliding_attention", "full_attention"]
# what the released file says about more layers, wider heads or more experts than there are here
OWN: dict[str, dict[str, Any]] = {
    "mistral": dict(sliding_window=WINDOW),
    "gemma2": dict(sliding_window=WINDOW),
    "gemma3_text": dict(sliding_window=WINDOW, sliding_window_pattern=2),
    "phi3": dict(num_attention_heads=2, num_key_value_heads=1, sliding_window=WINDOW),  # 48 factors: heads of 128
    "phi": dict(hidden_size=320, num_key_value_heads=4),  # heads of 80, as Phi-2 has
    "smollm3": dict(no_rope_layers=[1, 0]),
    "olmo3": dict(layer_types=LOCAL_GLOBAL, sliding_window=WINDOW),
    "cohere2": dict(sliding_window=WINDOW, sliding_window_pattern=2),
    "stablelm": dict(num_key_value_heads=4),
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "mixtral": dict(num_local_experts=EXPERTS),
    "qwen2_moe": dict(num_experts=EXPERTS, moe_intermediate_size=128, shared_expert_intermediate_size=256),
    "qwen3_moe": dict(num_experts=EXPERTS, num_experts_per_tok=4, moe_intermediate_size=128),
    "phimoe": dict(num_attention_heads=2, num_key_value_heads=1, num_local_experts=EXPERTS, sliding_window=WINDOW),
    "gpt_oss": dict(num_local_experts=EXPERTS, intermediate_size=256, sliding_window=WINDOW),
    "granitemoehybrid": dict(layer_types=["attention"] * LAYERS, shared_intermediate_size=512),
}


def hf_config(model_type: str) -> dict[str, Any]:
    """The family's released config.json, made small: all that is not a size stays."""
    released = EXAMPLES[model_type].values
    if "text_config" in released:
        small = SIZES | HEADS | dict(head_dim=64, sliding_window=WINDOW, sliding_window_pattern=2)
        return released | {"text_config": released["text_config"] | small}
    values = released | SIZES | HEADS | OWN.get(model_type, {})
    return {key: value for key, value in values.items() if key != "quantization_config"}


def weights(config: DecoderConfig, dtype: Any, load_in_4bit: bool):
    """A LoadFn: random weights, norms that are not 1, and routing that rounding does not change.

    Of two experts whose scores are nearly equal, another one may be chosen where a kernel rounds elsewhere, which says
    nothing about kernels. So the router reads the first E elements of a hidden state, and there a token's embedding has
    E levels, a quarter apart, in an order of its own: more than the layers in between move them.
    """
    draw, e = random_weights(dtype, load_in_4bit), EXPERTS
    middle = 0.0 if config.norm == "rms_plus_one" else 1.0

    def load(path: str, shape: tuple[int, ...], layers: tuple[int, ...] | None):
        value = draw(path, shape, layers)
        rng = np.random.default_rng(len(path))
        if path.endswith("norm.weight"):
            return jnp.asarray(middle + rng.uniform(-0.5, 0.5, value.shape), dtype)
        if path == "self_attn.sinks":
            return jnp.asarray(rng.normal(0, 1, value.shape), dtype)
        if config.experts is not None and path == "embed_tokens.weight":
            levels = rng.permuted(np.tile((np.arange(e) - (e - 1) / 2) / 4, (VOCAB, 1)), axis=1)
            return value.at[:, :e].set(jnp.asarray(levels, dtype))
        if path == "mlp.router.weight":
            return jnp.broadcast_to(jnp.eye(*shape, dtype=dtype) / 4, value.shape)
        return value

    return load


def base(model_type: str, *, dtype: Any = jnp.bfloat16, load_in_4bit: bool = True, **more: Any) -> FastLanguageModel:
    """The family's model; `more` are values of its config.json."""
    values = hf_config(model_type) | more
    config, names = config_from_hf(values)
    decoder = Decoder(config, weights(config, dtype, load_in_4bit), dtype)
    return FastLanguageModel(decoder, names, values, name="random", max_seq_length=TOKENS)


def adapted(model: FastLanguageModel, **options) -> FastLanguageModel:
    """With LoRA on every linear, whose B is not zero."""
    always = dict(r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return FastLanguageModel.get_peft_model(model, **(always | options))


def packed_batch() -> tuple[dict[str, jax.Array], LossOptions]:
    """Two packed rows of documents of 6 to 128 tokens, [1, 2, TOKENS], and what the loss must know of them."""
    source = Workload("none", 2, TOKENS, packed=True).source(VOCAB, 1)
    options = LossOptions("none", 256, source.max_segments, source.longest)
    return on_device(source.batch(0, 0)), options


class Pass(NamedTuple):
    loss: float
    grads: dict[str, np.ndarray]  # by leaf, its layers and experts stacked
    text: str  # of the compiled program


def compute(decoder: Decoder, policy: str) -> Pass:
    """Loss and gradients of the packed batch."""
    batch, options = packed_batch()
    definition, trainable, frozen = nnx.split(decoder, nnx.Param, ...)
    run = jax.jit(gradients, static_argnums=(0, 4))
    lowered = run.lower(definition, trainable, frozen, batch, options._replace(policy=policy), None)
    compiled = lowered.compile(compiler_options=compiler_options(policy, jax.default_backend()))
    loss, grads = compiled(trainable, frozen, batch, None)
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(grads))
    named = {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(g, np.float64) for p, g in leaves}
    return Pass(float(loss), named, compiled.as_text())


class Compared(NamedTuple):
    """How far kernels and references in bfloat16 are from references in float32."""

    text: str  # of the program with kernels
    losses: dict[str, float]
    errors: dict[str, tuple[float, float]]  # of each leaf's gradient: (kernels', references')

    def faults(self) -> list[str]:
        """What is further off than rounding explains; all of it."""
        found = [f"loss {way}: {value}" for way, value in self.losses.items() if not np.isfinite(value)]
        exact = self.losses["float32"]
        off = {way: abs(value - exact) / abs(exact) for way, value in self.losses.items()}
        if not off["kernels"] <= LOSS_FLOOR + 2 * off["references"]:
            found.append(f"losses {self.losses}")
        ratios = []
        for name, (kernels, references) in self.errors.items():
            ratios.append(kernels / references)
            if not (kernels <= WORST_RATIO * references or kernels <= FLOOR):
                found.append(f"gradient of {name}: {kernels:.2%} off, references {references:.2%}")
        if not np.median(ratios) <= MEDIAN_RATIO:
            found.append(f"median ratio of errors {np.median(ratios):.2f}")
        return found


def compare(decoder: Decoder, policy: str = "none") -> Compared:
    kernels = compute(decoder, policy)
    with pallas.references():
        references = compute(decoder, "none")
        with jax.default_matmul_precision("highest"):  # float32 products of a GPU have 10 bits otherwise
            exact = compute(in_float32(decoder), "none")
    errors = {}
    for name, wanted in exact.grads.items():
        size = np.linalg.norm(wanted)
        assert size > 0, f"gradient of {name} is 0 in float32: it says nothing"
        errors[name] = tuple(float(np.linalg.norm(p.grads[name] - wanted) / size) for p in (kernels, references))
    losses = {"kernels": kernels.loss, "references": references.loss, "float32": exact.loss}
    return Compared(kernels.text, losses, errors)


LOSS_FLOOR, FLOOR, WORST_RATIO, MEDIAN_RATIO = 1e-3, 0.01, 2.0, 1.25
