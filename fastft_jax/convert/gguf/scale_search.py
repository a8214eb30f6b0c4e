"""How k-quants choose the scales of their sub-blocks: least squares at each of several roundings, the best one wins.

Sub-blocks lie along the last axis, x [n, M]: n elements of M sub-blocks, so that every step is one vector operation
and sums run over elements in order, as llama.cpp's reference quantiser sums (ggml-quants.c, MIT licence). Everything is
float32. llama.cpp's compilers may fuse a product with a sum, which moves the last bit; a choice between two candidates
of equal error can then differ.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_F = np.float32
_TINY = _F(1e-15)  # blocks whose largest magnitude is below this count as zero


class Affine(NamedTuple):
    """x ~ scale * code - floor, codes 0..nmax, floor >= 0; the search's own codes are rint(inverse * (x - low))."""

    scale: Float[np.ndarray, "M"]
    floor: Float[np.ndarray, "M"]
    inverse: Float[np.ndarray, "M"]
    low: Float[np.ndarray, "M"]


def affine(
    x: Float[np.ndarray, "n M"],
    weights: Float[np.ndarray, "n M"],
    nmax: int,
    *,
    start: float,
    steps: int,
    step: float = 0.1,
    absolute: bool = False,
) -> Affine:
    """Scale and floor that minimise sum(w * (scale code - floor - x)^2), or with `absolute` sum(w * |...|).

    Candidates: the plain range, then for i = 0..steps the codes rint((x - min) (nmax + start + i step) / (max - min))
    with the weighted least-squares scale and floor of those codes, `min` being that of the best candidate so far.
    """
    minimum, high = np.minimum(x.min(0), _F(0)), x.max(0)
    flat = high == minimum
    high[flat] += 1
    sum_w, sum_x = weights.sum(0), (weights * x).sum(0)
    codes, work = np.empty_like(x), np.empty_like(x)

    def round_by(inverse):
        np.subtract(x, minimum, out=codes)
        np.multiply(codes, inverse, out=codes)
        np.rint(codes, out=codes)
        np.minimum(codes, _F(nmax), out=codes)
        np.maximum(codes, _F(0), out=codes)

    def error(scale, minimum):
        np.multiply(codes, scale, out=work)
        np.add(work, minimum, out=work)
        np.subtract(work, x, out=work)
        np.abs(work, out=work) if absolute else np.multiply(work, work, out=work)
        np.multiply(work, weights, out=work)
        return work.sum(0)

    inverse, low = _F(nmax) / (high - minimum), minimum.copy()
    round_by(inverse)
    scale = 1 / inverse
    best = error(scale, minimum)
    for i in range(steps + 1):
        trial = (_F(start) + _F(step) * _F(i) + _F(nmax)) / (high - minimum)
        round_by(trial)
        np.multiply(weights, codes, out=work)
        sum_l = work.sum(0)
        sum_xl = (work * x).sum(0)
        np.multiply(work, codes, out=work)
        sum_l2 = work.sum(0)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        solvable = determinant > 0
        determinant[~solvable] = 1
        a = (sum_w * sum_xl - sum_x * sum_l) / determinant
        b = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = b > 0  # only a floor can be stored
        np.divide(sum_xl, sum_l2, out=a, where=positive & solvable)
        b[positive] = 0
        found = error(a, b)
        better = solvable & (found < best)
        for kept, new in ((best, found), (scale, a), (inverse, trial), (low, minimum), (minimum, b)):
            np.copyto(kept, new, where=better)
    scale[flat] = 0
    inverse[flat] = 0
    return Affine(scale, -minimum, inverse, low)


class Symmetric(NamedTuple):
    """x ~ scale * code with codes -nmax..nmax-1; the search's own codes are rint(inverse * x)."""

    scale: Float[np.ndarray, "M"]
    inverse: Float[np.ndarray, "M"]


def symmetric(x: Float[np.ndarray, "n M"], nmax: int, weights: Float[np.ndarray, "n M"] | None = None) -> Symmetric:
    """The scale that minimises sum(w (scale code - x)^2) over the codes rint(-x (nmax + i/10) / extreme).

    w = x^2 without weights; i = -9..9; `extreme` is the element of largest magnitude, which gets the code -nmax.
    """
    extreme = _extreme(x)
    zero = np.abs(extreme) < _TINY
    extreme = np.where(zero, _F(1), extreme)
    codes, work = np.empty_like(x), np.empty_like(x)
    weights = x * x if weights is None else weights
    scale = inverse = best = None
    for i in (0, *range(-9, 0), *range(1, 10)):
        trial = -(_F(nmax) + _F(0.1) * _F(i)) / extreme
        np.multiply(x, trial, out=codes)
        np.rint(codes, out=codes)
        np.minimum(codes, _F(nmax - 1), out=codes)
        np.maximum(codes, _F(-nmax), out=codes)
        sum_lx = np.multiply(np.multiply(weights, x, out=work), codes, out=work).sum(0)
        sum_l2 = np.multiply(np.multiply(weights, codes, out=work), codes, out=work).sum(0)
        fitted = np.divide(sum_lx, sum_l2, out=np.zeros_like(sum_lx), where=sum_l2 > 0)
        if best is None:
            scale, inverse, best = fitted, trial, fitted * sum_lx
            continue
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        for kept, new in ((best, fitted * sum_lx), (scale, fitted), (inverse, trial)):
            np.copyto(kept, new, where=better)
    scale[zero] = 0
    return Symmetric(scale, inverse)


def coordinate_descent(x: Float[np.ndarray, "n M"], nmax: int) -> tuple[Float[np.ndarray, "M"], np.ndarray]:
    """(scale, codes -nmax..nmax-1 as float32 [n, M]): symmetric, each code in turn moved to its best value.

    Minimises the error of `symmetric` from its first candidate, in at most five rounds over the elements.
    """
    extreme = _extreme(x)
    zero = np.abs(extreme) < _TINY
    inverse = _F(-nmax) / np.where(zero, _F(1), extreme)
    codes = np.clip(np.rint(inverse * x), _F(-nmax), _F(nmax - 1))
    scale = _refine(x, x * x, codes, -nmax, nmax - 1)
    scale[zero] = 0
    codes[:, zero] = -nmax  # the reference leaves stored zeros there
    return scale, codes


def positive(
    x: Float[np.ndarray, "n M"], nmax: int, weights: Float[np.ndarray, "n M"]
) -> tuple[Float[np.ndarray, "M"], Float[np.ndarray, "n M"]]:
    """(scale, codes 0..nmax) for values of at least 0: the best of nine roundings, then each code in turn."""
    largest = np.maximum(x.max(0), 0)
    zero = largest < _TINY
    largest = np.where(zero, _F(1), largest)
    inverse = best = None
    for i in (0, *range(-4, 0), *range(1, 5)):
        trial = (_F(0.1) * _F(i) + _F(nmax)) / largest
        found = (weights * (x - (1 / trial) * np.minimum(np.rint(trial * x), _F(nmax))) ** 2).sum(0)
        if best is None:
            inverse, best = trial, found
            continue
        better = found < best
        for kept, new in ((best, found), (inverse, trial)):
            np.copyto(kept, new, where=better)
    codes = np.clip(np.rint(inverse * x), _F(0), _F(nmax))
    scale = _refine(x, weights, codes, 0, nmax)
    scale[zero] = 0
    codes[:, zero] = 0
    return scale, codes


def _refine(x, weights, codes, least: int, most: int) -> Float[np.ndarray, "M"]:
    """Moves each code in turn to its best value, in place, in at most five rounds; the scale that fits them."""
    sum_lx, sum_l2 = (weights * x * codes).sum(0), (weights * codes * codes).sum(0)
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            w, wx, code = weights[i], weights[i] * x[i], codes[i]
            lx, l2 = sum_lx - wx * code, sum_l2 - w * code * code
            movable = (lx > 0) & (l2 > 0)
            wanted = np.divide(x[i] * l2, lx, out=np.zeros_like(lx), where=movable)
            wanted = np.clip(np.rint(wanted), _F(least), _F(most))
            lx, l2 = lx + wx * wanted, l2 + w * wanted * wanted
            better = movable & (wanted != code) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            if better.any():
                changed = True
                for kept, new in ((code, wanted), (sum_lx, lx), (sum_l2, l2)):
                    np.copyto(kept, new, where=better)
        if not changed:
            break
    return np.divide(sum_lx, sum_l2, out=np.zeros_like(sum_lx), where=sum_l2 > 0)


def _extreme(x: Float[np.ndarray, "n M"]) -> Float[np.ndarray, "M"]:
    """The first element of largest magnitude."""
    return np.take_along_axis(x, np.abs(x).argmax(0)[None], axis=0)[0]
