"""What a compiled program's text says of an instruction: where it comes from in the source, its bytes, its FLOPs."""

import math
import re
from dataclasses import dataclass
from functools import cached_property

from fastft_jax.pallas_kernels.nf4.reference import GROUPS_PER_SCALE
from fastft_jax.pallas_kernels.nf4.triton import GROUPS_PER_PROGRAM

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) .*\{$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c\d+)\[([\d,]*)\]")
_ITEM_BITS = {"pred": 8, "bf16": 16}


@dataclass(frozen=True)
class Shape:
    """An array's element type, as XLA writes it, and its dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        bits = _ITEM_BITS.get(self.dtype) or int(re.match(r"[a-z]+(\d+)", self.dtype)[1])
        return self.size * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One instruction; `shapes` are its outputs, `operands` the names of its inputs."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def scope(self) -> str:
        """`jit(step)/.../nf4_dequantize/pallas_call`: the names of functions and scopes around it."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def target(self) -> str:
        return self.attribute(r'custom_call_target="([^"]*)"') or ""

    @property
    def kernel_names(self) -> list[str]:
        """What its kernel may be called in a profile: equal fusions share the kernel of the first."""
        names = [self.name, self.attribute(r'deduplicated_name="([^"]*)"')]
        return [kernel_name(name) for name in names if name]


def kernel_name(name: str) -> str:
    """An instruction's name as kernels are named: without dots and dashes."""
    return re.sub(r"[^A-Za-z0-9_]", "_", name)


class Program:
    """The instructions of a compiled program's text (`compiled.as_text()`), by name and by kernel name."""

    def __init__(self, text: str):
        self.instructions: dict[str, Instruction] = {}
        self._bodies: dict[str, list[str]] = {}
        self._tables: dict[str, dict[int, str]] = {}
        body: list[str] = []
        table: dict[int, str] | None = None
        for line in text.splitlines():
            if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = self._tables[line] = {}
            elif table is not None and (row := re.match(r"(\d+) (.*)$", line)):
                table[int(row[1])] = row[2].strip('"{}')
            elif found := _INSTRUCTION.match(line):
                instruction = _instruction(*found.groups())
                self.instructions[instruction.name] = instruction
                body.append(instruction.name)
            elif found := _COMPUTATION.match(line):
                body = self._bodies[found[1]] = []

    @cached_property
    def by_kernel(self) -> dict[str, Instruction]:
        """Kernel name -> an instruction that runs it (the first in the text)."""
        found: dict[str, Instruction] = {}
        for instruction in self.instructions.values():
            for name in instruction.kernel_names:
                found.setdefault(name, instruction)
        return found

    def frames(self, instruction: Instruction) -> list[str]:
        """`file:function` of the call stack that made it, innermost first; empty where the text does not say."""
        number, out = int(instruction.attribute(r"stack_frame_id=(\d+)") or 0), []
        while row := self._tables.get("StackFrames", {}).get(number):
            location, parent = (int(x) for x in re.findall(r"=(\d+)", row)[:2])
            file, function = re.findall(r"=(\d+)", self._tables["FileLocations"][location])[:2]
            names = self._tables["FileNames"][int(file)], self._tables["FunctionNames"][int(function)]
            out.append(":".join(names))
            if parent == number:
                break
            number = parent
        return out

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        known = (self.instructions.get(name) for name in instruction.operands)
        return [shape for operand in known if operand for shape in operand.shapes[:1]]

    def dot(self, instruction: Instruction) -> tuple[int, int, str] | None:
        """(FLOPs, smallest of M, N and K, the factors' dtype) of a matrix product, or of the one inside a fusion."""
        if instruction.opcode == "dot":
            contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]+)\}")
        elif "matmul" in instruction.target or "gemm" in instruction.target:
            contracted = instruction.attribute(r'"lhs_contracting_dimensions":\["?([\d,"]+)\]')
        else:
            inner = self._bodies.get(instruction.attribute(r"calls=%([\w.\-]+)") or "", ())
            return next(filter(None, (self.dot(self.instructions[name]) for name in inner)), None)
        factors = self.operand_shapes(instruction)
        if len(factors) < 2 or not contracted:
            return None
        k = math.prod(factors[0].dims[int(axis)] for axis in re.findall(r"\d+", contracted))
        out = instruction.shapes[0].size
        batch = max(factors[0].size * factors[1].size // (k * k * out), 1)  # B M K * B N K / (K K B M N)
        m, n = factors[0].size // k // batch, factors[1].size // k // batch
        return 2 * out * k, min(m, n, k), factors[0].dtype

    def kernel_bytes(self, instruction: Instruction) -> int | None:
        """Bytes that a Pallas kernel must move: every operand read once, every output written once.

        None for anything else: XLA's fusions may read a slice of an operand. NF4 decoding reads one layer of a stack
        and writes a part of a buffer, so there the launch grid counts; other kernels that write in place or read a
        stack are unknown.
        """
        if instruction.target != "__gpu$xla.gpu.triton" or "/uninitialised" in instruction.scope:
            return None
        out = instruction.shapes
        if "nf4_dequantize" in instruction.scope:
            if "_transposed" in instruction.scope:  # launched on another grid
                return None
            programs, matrices = (int(instruction.attribute(rf"grid_{axis} = (\d+)") or 0) for axis in "xy")
            groups = programs * matrices * GROUPS_PER_PROGRAM
            scale = 1 + 4 / GROUPS_PER_SCALE if "nf4_dequantize_double" in instruction.scope else 4
            return round(groups * (32 + scale + 64 * out[0].bytes / out[0].size)) or None
        if "output_to_operand_aliasing" in instruction.attributes:
            return None
        operands = self.operand_shapes(instruction)
        if any(shape.bytes > 8 * sum(o.bytes for o in out) for shape in operands):
            return None  # a stack, of which the kernel reads one layer
        return sum(shape.bytes for shape in (*operands, *out))


def _instruction(name: str, shape: str, opcode: str, rest: str) -> Instruction:
    shapes = tuple(Shape(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in _ARRAY.findall(shape))
    inputs, _, attributes = rest.partition(")")
    # a Pallas kernel's text carries its whole code; the head of it is enough
    return Instruction(name, opcode, shapes, tuple(re.findall(r"%([\w.\-]+)", inputs)), attributes[:4000])
