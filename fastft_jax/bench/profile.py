"""Where the time of a step goes: every kernel of a profile in a class, each class against what bounds it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastft_jax.bench.hlo import Instruction, Program
from fastft_jax.bench.trace import Event, busy

COPIES, LORA, GEMM, OTHER = "copies", "LoRA", "GEMM", "other"

# The first rule that matches decides. Looked at, in one text: the kernel's name, `hlo=` its HLO instruction, `scope=`
# the names of functions and jax.named_scope around it, `at=` the file:function chain of this package that made it.
RULES: tuple[tuple[str, str], ...] = (
    (COPIES, r"^(?i:memcpy|memset)"),
    ("attention", r"cudnn_generated\S*sdpa"),
    ("attention", r"(?i)fmha|flash_?att|dot_product_attention"),
    ("attention", r"pallas_kernels/attention/|(^|/)attention_(forward|backward)"),
    ("dequant", r"nf4_(dequantize|decode)|pallas_kernels/nf4/|quant/nf4\.py:dequantize"),
    ("fp8 scales", r"(^|/)fp8_(quantise|rescale)|pallas_kernels/fp8/__init__"),
    ("loss", r"linear_cross_entropy|(^|/)cross_entropy_|scope=\S*/loss/"),
    ("optimizer", r"adamw?_8bit|trainers/optim\.py|quant/(blockwise|exact)\.py|optax/|scope=\S*/optimizer/"),
    ("optimizer", r"trainers/step\.py:make_train_step\.<locals>\.step\.<locals>"),
    (LORA, r"scope=\S*/lora/"),
    (GEMM, r"^nvjet_|^(void )?cutlass|(?i:^cublas)|^(sm\d+|ampere|volta|turing)_\S*gemm"),
    (GEMM, r"(^|/)(quantised_mat(mul|vec)|grouped_(matmul|outer))"),
    (GEMM, r"gemm_fusion|(?i:gemm\w*kernel)|splitKreduce|hlo=(cublas|dot\b)"),
    (GEMM, r"hlo=\S*reduce\S* scope=\S*/dot_general "),  # the sum of a product that was split along K
    ("norm/rope/glu", r"(^|/)(fp8_)?((add_)?(rms|layer)_norm|rope_|(silu_|gelu\w*_)?glu)"),
    ("norm/rope/glu", r"pallas_kernels/(rms_norm|layer_norm|rope|glu)/|models/rope\.py"),
    (COPIES, r"(^|/)uninitialised"),
    (COPIES, r"^(loop_|input_|wrapped_)?(dynamic_slice|dynamic_update_slice|slice)[_.\d ]"),
    (COPIES, r"^(loop_|input_|wrapped_)?(copy|concatenate|pad|transpose|broadcast)[_.\d ]"),
    (COPIES, r"scope=\S*/(dynamic_slice|dynamic_update_slice|copy|pad|broadcast_in_dim) "),
)
CLASSES = (GEMM, "attention", "norm/rope/glu", "dequant", "fp8 scales", LORA, "loss", "optimizer", COPIES, OTHER)


@dataclass
class Row:
    """One class of kernels in one step: milliseconds, launches, and what its known work takes at least."""

    name: str
    milliseconds: float = 0.0
    launches: float = 0.0
    bound: float | None = None  # at the card's peak, memory at the speed of a copy
    sustained: float | None = None  # the same, matrix units at the rate the card sustains
    known: float = 0.0  # share of `milliseconds` whose work is known


@dataclass(frozen=True)
class Speeds:
    """What a card can do; None where it is not known. FLOP/s are bf16, dense; fp8 counts as twice as fast."""

    peak: float | None = None
    sustained: float | None = None
    copy: float | None = None  # bytes/s, read plus written


@dataclass(frozen=True)
class Profile:
    """A step's profile: rows by class, and idle and overlapping time, all in milliseconds a step."""

    rows: list[Row]
    step: float
    idle: float
    overlap: float
    kernels: list[tuple[str, str, float, float]] = field(
        default_factory=list
    )  # class, name, ms, launches; longest first


def classify(name: str, hlo_op: str = "", scope: str = "", frames: Sequence[str] = ()) -> str:
    """The class of a kernel, by RULES."""
    text = f"{name} hlo={hlo_op} scope={scope} at={' '.join(_ours(frames))}"
    return next((kind for kind, pattern in RULES if re.search(pattern, text)), OTHER)


def _ours(frames: Sequence[str]) -> list[str]:
    """Frames in this package (but not of the bench, which everything runs under) and in optax."""
    short = (re.sub(r"^.*?(?=(fastft_jax|optax)/)", "", frame) for frame in frames)
    return [frame for frame in short if frame.startswith(("fastft_jax/", "optax/")) and "/bench/" not in frame]


class _Work:
    """Class and known work of an event, through the program's text; each kernel is looked up once.

    An instruction may launch several kernels, as a product that clears a buffer first does: the one that takes longest
    has the work.
    """

    def __init__(self, program: Program | None, lora_width: int, events: Sequence[Event]):
        self._program, self._lora_width = program, lora_width
        self._seen: dict[tuple[str, str], tuple[str, float, float]] = {}
        spent: dict[str, dict[str, float]] = {}
        for event in events:
            names = spent.setdefault(event.hlo_op, {})
            names[event.name] = names.get(event.name, 0.0) + event.duration
        self._main = {hlo_op: max(names, key=names.get) for hlo_op, names in spent.items() if hlo_op}

    def of(self, event: Event) -> tuple[str, float, float]:
        """(class, FLOPs in bf16's worth, bytes); zeros where they are not known."""
        key = (event.name, event.hlo_op)
        if key not in self._seen:
            self._seen[key] = self._look_up(event)
        kind, flops, moved = self._seen[key]
        if event.copied and re.match(r"(?i)memcpy\W*d(evice)?(2|to)d", event.name.replace(" ", "")):
            moved = 2 * event.copied  # between host and device the link bounds it, whose speed is not known
        return kind, flops, moved

    def _look_up(self, event: Event) -> tuple[str, float, float]:
        instruction = self._instruction(event)
        if instruction is None or self._main.get(event.hlo_op, event.name) != event.name:
            return classify(event.name, event.hlo_op, event.scope), 0, 0
        program, dot = self._program, self._program.dot(instruction)
        scope = event.scope if len(event.scope) > len(instruction.scope) else instruction.scope
        kind = classify(event.name, instruction.name, scope, program.frames(instruction))
        if dot is None:
            return kind, 0, program.kernel_bytes(instruction) or 0
        flops, narrowest, dtype = dot
        if kind in (GEMM, OTHER, COPIES):  # a fusion named after its epilogue is a product all the same
            kind = LORA if narrowest <= self._lora_width else GEMM
        return kind, flops / (2 if dtype.startswith("f8") else 1), 0

    def _instruction(self, event: Event) -> Instruction | None:
        if self._program is None:
            return None
        return self._program.instructions.get(event.hlo_op) or self._program.by_kernel.get(event.name)


def summarise(
    events: Sequence[Event],
    steps: int,
    *,
    program: Program | None = None,
    lora_width: int = 0,
    speeds: Speeds = Speeds(),  # noqa: B008 - frozen
    floors: Mapping[str, float] | None = None,
) -> Profile:
    """The profile of `steps` equal steps from their device events.

    program: the step's text, which knows more of a kernel than its name. lora_width: a product no wider than this
    counts as LoRA. floors: FLOPs a step of classes whose kernels do not tell theirs (attention).
    """
    rows = {name: Row(name) for name in CLASSES}
    seconds = dict.fromkeys(CLASSES, (0.0, 0.0))
    by_kernel: dict[tuple[str, str], list[float]] = {}
    work = _Work(program, lora_width, events)
    for event in events:
        kind, flops, moved = work.of(event)
        row, ms = rows[kind], event.duration / 1e6 / steps
        row.milliseconds += ms
        row.launches += 1 / steps
        bounds = [_least(flops, moved, rate, speeds.copy) for rate in (speeds.peak, speeds.sustained)]
        if bounds[0] is not None:
            row.known += ms
            seconds[kind] = tuple(s + (b or 0.0) / steps for s, b in zip(seconds[kind], bounds, strict=True))
        entry = by_kernel.setdefault((kind, _family(event.name)), [0.0, 0.0])
        entry[0] += ms
        entry[1] += 1 / steps
    for name, row in rows.items():
        floor = (floors or {}).get(name, 0.0)
        if row.milliseconds and not row.known and floor:
            seconds[name] = tuple(floor / rate if rate else 0.0 for rate in (speeds.peak, speeds.sustained))
            row.known = row.milliseconds if speeds.peak else 0.0
        if row.known:
            row.bound = 1e3 * seconds[name][0]
            row.sustained = 1e3 * seconds[name][1] if speeds.sustained else None
        row.known = row.known / row.milliseconds if row.milliseconds else 0.0
    window = (max(e.end for e in events) - min(e.start for e in events)) if events else 0.0
    ran, summed = busy(list(events)), sum(e.duration for e in events)
    longest = sorted(((k, n, ms, count) for (k, n), (ms, count) in by_kernel.items()), key=lambda entry: -entry[2])
    scale = 1e6 * steps
    present = [row for row in rows.values() if row.launches]
    return Profile(present, window / scale, (window - ran) / scale, (summed - ran) / scale, longest)


def _least(flops: float, moved: float, rate: float | None, copy: float | None) -> float | None:
    """Seconds that the work takes at least; None where there is no work to go by, or no speed."""
    times = [work / speed for work, speed in ((flops, rate), (moved, copy)) if work and speed]
    return max(times, default=None)


def _family(name: str) -> str:
    """Kernel names without their numbers, so that the same fusion of several places is one line."""
    return re.sub(r"(_\d+)+$", "", name)[:90]


def lines(profile: Profile, top: int = 12) -> list[str]:
    """The table for people, and the longest kernels under it."""
    head = (
        f"{'class':14s} {'ms/step':>9s} {'share':>6s} {'kernels':>8s} {'bound ms':>9s} {'sustained':>9s} {'known':>6s}"
    )
    number = lambda x: "-" if x is None else f"{x:.2f}"  # noqa: E731
    share = lambda ms: f"{ms / profile.step:.1%}" if profile.step else "-"  # noqa: E731
    out = [head]
    for row in sorted(profile.rows, key=lambda row: -row.milliseconds):
        known = f"{row.known:.0%}" if row.bound is not None else "-"
        out.append(
            f"{row.name:14s} {row.milliseconds:9.2f} {share(row.milliseconds):>6s} {row.launches:8.0f} "
            f"{number(row.bound):>9s} {number(row.sustained):>9s} {known:>6s}"
        )
    out.append(f"{'idle':14s} {profile.idle:9.2f} {share(profile.idle):>6s}")
    if profile.overlap >= 0.005:
        out.append(f"{'overlapping':14s} {-profile.overlap:9.2f} {share(-profile.overlap):>6s}")
    out += [f"{'step':14s} {profile.step:9.2f}", "longest kernels:"]
    out += [f"  {ms:9.2f} ms {count:6.0f} x  {kind:13s} {name}" for kind, name, ms, count in profile.kernels[:top]]
    return out


def as_record(profile: Profile, top: int = 40) -> dict[str, Any]:
    """The profile as JSON: milliseconds a step, rounded to microseconds."""
    short = lambda x: None if x is None else round(x, 3)  # noqa: E731
    return {
        "step": short(profile.step),
        "idle": short(profile.idle),
        "overlap": short(profile.overlap),
        "classes": {
            row.name: {
                "milliseconds": short(row.milliseconds),
                "launches": round(row.launches, 1),
                "bound": short(row.bound),
                "bound_sustained": short(row.sustained),
                "known": short(row.known),
            }
            for row in profile.rows
        },
        "kernels": [[kind, name, short(ms), round(count, 1)] for kind, name, ms, count in profile.kernels[:top]],
    }
