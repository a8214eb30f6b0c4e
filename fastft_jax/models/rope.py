"""Rotary frequencies of every scaling that transformers knows for these families, and their cos/sin tables.

Formulas: default arXiv:2104.09864; linear (kaiokendev); dynamic NTK (bloc97, emozilla); yarn arXiv:2309.00071;
llama3 (Llama 3.1 model card); longrope arXiv:2402.13753. Checked against transformers.modeling_rope_utils.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastft_jax.models.config import RopeConfig

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def rope_tables(
    config: RopeConfig, head_dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]]:
    """cos and sin of `position * inv_freq`, times the scaling's attention factor; float32.

    They are as wide as half of what is rotated of a head, which partial_rotary_factor says.
    """
    angles = positions[..., None].astype(jnp.float32) * _inv_freq(config, config.rotary_dim(head_dim), positions)
    factor = _attention_factor(config)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def llama3_divisors(config: RopeConfig, head_dim: int) -> np.ndarray:
    """What rope_type "llama3" divides each pair's frequency by; float32 [P/2]."""
    plain = _plain(config.rope_theta, config.rotary_dim(head_dim))
    return plain / _llama3(config, plain)


def scale_correction(config: RopeConfig) -> float:
    """What `mscale_all_dim` multiplies the attention logits by: (0.1 mscale_all_dim ln(factor) + 1)^2, else 1.

    DeepSeek's addition to yarn; cos and sin have the rest of it (`_attention_factor`). arXiv:2405.04434, section 3.1.3.
    """
    if config.rope_type == "default" or not config.mscale_all_dim:
        return 1.0
    return _mscale(_factor(config), config.mscale_all_dim) ** 2


def _inv_freq(config: RopeConfig, dim: int, positions: Int[Array, "B T"]) -> Float[Array, "H/2"]:
    plain = _plain(config.rope_theta, dim)
    match config.rope_type:
        case "default":
            return jnp.asarray(plain)
        case "none":
            return jnp.zeros_like(plain)  # cos 1, sin 0: the same kernel as for other layers
        case "linear":
            return jnp.asarray(plain / np.float32(config.factor))
        case "llama3":
            return jnp.asarray(_llama3(config, plain))
        case "yarn":
            return jnp.asarray(_yarn(config, dim))
        case "dynamic":
            return _dynamic(config, dim, positions)
        case "longrope":
            return _longrope(config, plain, positions)
    raise ValueError(f"rope_type {config.rope_type!r} is not one of {ROPE_TYPES}")


def _plain(theta: float, dim: int) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (np.float32(1.0) / np.float32(theta) ** exponents).astype(np.float32)


def _llama3(config: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended."""
    context = config.original_max_position_embeddings
    wavelength = 2 * np.pi / plain
    smooth = (context / wavelength - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blended = (1 - smooth) * plain / config.factor + smooth * plain
    scaled = np.where(wavelength > context / config.low_freq_factor, plain / config.factor, blended)
    return np.where(wavelength < context / config.high_freq_factor, plain, scaled).astype(np.float32)


def _yarn(config: RopeConfig, dim: int) -> np.ndarray:
    """Blend of extrapolated (plain) and interpolated (plain / factor) frequencies by a ramp over the dimensions."""
    context = config.original_max_position_embeddings

    def dimension_of(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(config.beta_fast or 32), dimension_of(config.beta_slow or 1)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    interpolated_share = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    plain = _plain(config.rope_theta, dim)
    return (plain / _factor(config) * interpolated_share + plain * (1 - interpolated_share)).astype(np.float32)


def _dynamic(config: RopeConfig, dim: int, positions: Int[Array, "B T"]) -> Float[Array, "H/2"]:
    """NTK base that grows with the longest position in the batch, once that passes max_position_embeddings."""
    longest = jnp.maximum(jnp.max(positions) + 1, config.max_position_embeddings).astype(jnp.float32)
    growth = config.factor * longest / config.max_position_embeddings - (config.factor - 1)
    base = config.rope_theta * growth ** (dim / (dim - 2))
    return 1.0 / base ** jnp.asarray(np.arange(0, dim, 2, dtype=np.float32) / dim)


def _longrope(config: RopeConfig, plain: np.ndarray, positions: Int[Array, "B T"]) -> Float[Array, "H/2"]:
    """Per-dimension divisors, one list for short batches and one for those past the original context."""
    short = plain / np.asarray(config.short_factor, np.float32)
    long = plain / np.asarray(config.long_factor, np.float32)
    return jnp.where(jnp.max(positions) + 1 > config.original_max_position_embeddings, long, short)


def _factor(config: RopeConfig) -> float:
    if config.factor is not None:
        return config.factor
    return config.max_position_embeddings / config.original_max_position_embeddings


def _attention_factor(config: RopeConfig) -> float:
    """The scalar that multiplies cos and sin (yarn and longrope; 1 for the others)."""
    if config.rope_type not in ("yarn", "longrope"):
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    factor = _factor(config)
    if config.rope_type == "longrope":
        if factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(factor) / math.log(config.original_max_position_embeddings))
    if config.mscale and config.mscale_all_dim:
        return _mscale(factor, config.mscale) / _mscale(factor, config.mscale_all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
