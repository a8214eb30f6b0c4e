"""Every family goes out in every format; its client loads it and computes what the live model computes.

What is measured here is docs/compatibility.md: with `FASTFT_COMPATIBILITY=FILE` (`make compatibility`) every cell is
appended to FILE as a line of JSON, without it the page must say what is found. The live model is ours, in float32, with
an adapter that acts on every linear layer.
"""

import json
import os
import re
import runpy
import warnings

import bitsandbytes as bnb
import gguf_tiny
import jax
import jax.numpy as jnp
import llama_cpp_client
import numpy as np
import peft
import pytest
import safetensors
import tiny_checkpoints
import torch
import transformers

from fastft_jax import FastLanguageModel
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.models import lora
from fastft_jax.models.families.registry import FAMILIES

VARIABLE = "FASTFT_COMPATIBILITY"
IDS = np.random.default_rng(0).integers(4, 300, (1, 24))
TOLERANCE = 1e-4  # float32 on both sides leaves the order of sums: the bound of every parity test
GELU_IN_LLAMA_CPP = 2e-2  # from a table in float16 there: 1e-3 of a value of a few units
NO_CLASS = "transformers has no class for it (its code comes with the checkpoint); merged folders are read back by us"
pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def tokenizer():
    return gguf_tiny.byte_tokenizer()


@pytest.fixture(autouse=True)
def adapters_drawn_without_compiling(monkeypatch):
    def draw(seed, init, shapes):
        rng = np.random.default_rng(seed)
        both = [((*lead, r, k), (*lead, n, r)) for *lead, n, k, r in shapes]
        return [tuple(rng.uniform(-1, 1, s).astype("f") / np.float32(s[-1] ** 0.5) for s in pair) for pair in both]

    monkeypatch.setattr(lora, "_initial", lambda *a: jax.tree.map(jnp.asarray, draw(*a)))


@pytest.fixture(scope="module")
def script(repo):
    return runpy.run_path(str(repo / "scripts" / "write_compatibility_page.py"))


class Case:
    """One family: its checkpoint, transformers' model of it, ours with the adapter; what each format makes of it."""

    def __init__(self, family: str, tokenizer, folder):
        self.family, self.tokenizer, self.folder, self.merged = family, tokenizer, folder, None
        self.reference = tiny_checkpoints.write_checkpoint(family, tokenizer, folder / "base")
        self.model = load(folder / "base")
        self.plain = self.refused(lambda: self.gguf("f32", "plain"))  # before the adapter is there
        FastLanguageModel.get_peft_model(self.model, r=4, lora_alpha=6, init_lora_weights=False)
        config = self.model.decoder.config
        self.logits = np.asarray(self.model(IDS))[0]
        self.gelu = config.activation.startswith("gelu")
        self.window = min((w for w in config.layer_windows if w), default=None)

    @staticmethod
    def refused(export):
        """What `export` returns, or the error with which we refuse it by name."""
        try:
            return export()
        except (NotImplementedError, CheckpointError, ConfigError) as error:
            return error

    def gguf(self, method: str, name: str, verify: bool = False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (path,) = self.model.save_pretrained_gguf(
                self.folder / name, self.tokenizer, method, verify=verify, rows=IDS
            )
        self.ignores_window = any("ignores the sliding window" in str(w.message) for w in caught)
        return path

    def peft(self):
        if self.reference is None:
            return NO_CLASS
        self.model.save_pretrained(self.folder / "peft")
        theirs = peft.PeftModel.from_pretrained(self.reference, self.folder / "peft")
        try:
            return difference(torch_logits(theirs), self.logits)
        finally:
            theirs.unload()

    def merged_16bit(self):
        folder, alone = self.folder / "merged_16bit", self.reference is None  # nobody else reads it
        options = {"dtype": "float32", "verify": alone, "rows": IDS}
        written = self.refused(lambda: self.model.save_pretrained_merged(folder, **options))
        if isinstance(written, Exception):
            return written
        if self.reference is None:
            return NO_CLASS
        self.in_16bit = transformers_model(folder, dtype=torch.float32)
        return difference(torch_logits(self.in_16bit), self.logits)

    def merged_4bit(self):
        """Against the merged model above with its matrices replaced by those of this folder, decoded by bitsandbytes;
        each of them is near enough to be the same one in NF4, whose error is a tenth."""
        folder, options = self.folder / "merged_4bit", {"verify": self.reference is None, "rows": IDS}
        written = self.refused(lambda: self.model.save_pretrained_merged(folder, None, "merged_4bit", **options))
        if isinstance(written, Exception):
            return written
        if self.reference is None:
            return NO_CLASS
        theirs, plain = transformers_model(folder), self.in_16bit
        modules = dict(theirs.named_modules())
        packed = {f"{name}.weight" for name, module in modules.items() if isinstance(module, bnb.nn.Linear4bit)}
        assert packed
        given = dict(theirs.named_parameters())
        for name, parameter in plain.named_parameters():
            if name in packed:
                module = modules[name.removesuffix(".weight")]
                module.compute_dtype = torch.float32
                module.train()  # in eval mode some CPUs pack the weights anew, in place
                new = decoded(folder, name)
            else:
                new = given[name].data = given[name].data.float()  # in bfloat16 there
            error, allowed = (new - parameter.data).norm(), 0.13 if name in packed else 2**-8
            assert error <= allowed * parameter.data.norm(), name
            parameter.data = new
        return difference(torch_logits(theirs), torch_logits(plain))

    def in_llama_cpp(self, path, **options):
        if isinstance(path, Exception):
            return path
        upto = self.window if self.ignores_window else None  # equal up to it
        return difference(llama_cpp_client.logits(path, IDS[0], **options)[:upto], self.logits[:upto])

    def gguf_model(self):
        self.merged = self.refused(lambda: self.gguf("f32", "gguf", verify=True))
        return self.in_llama_cpp(self.merged)

    def gguf_lora(self):
        if isinstance(self.plain, Exception):
            return self.plain
        lora = self.refused(lambda: self.gguf("lora", "gguf:lora"))
        if isinstance(lora, Exception):
            return lora
        return self.in_llama_cpp(self.plain, lora_path=str(lora))

    def gguf_in(self):
        if isinstance(self.merged, Exception):
            return self.merged
        model = self.refused(lambda: load(self.merged))
        if isinstance(model, Exception):
            return model
        upto = self.window if self.ignores_window else None  # the file does not say it
        return difference(np.asarray(model(IDS))[0, :upto], self.logits[:upto])


FORMATS = {
    "peft": Case.peft,
    "merged_16bit": Case.merged_16bit,
    "merged_4bit": Case.merged_4bit,
    "gguf": Case.gguf_model,
    "gguf:lora": Case.gguf_lora,
    "gguf in": Case.gguf_in,
}


def load(path):
    options = {"max_seq_length": 64, "dtype": "float32", "load_in_4bit": False}
    return FastLanguageModel.from_pretrained(path, **options)[0]


def transformers_model(folder, **options):
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = transformers.AutoModelForImageTextToText if hasattr(config, "vision_config") else None
    auto = auto or transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, attn_implementation="eager", **options)


def decoded(folder, name: str) -> torch.Tensor:
    """A packed matrix of a checkpoint, in float32; what is before "layers" may be called otherwise in a file."""
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        inside = name.partition("layers.")[2]
        name = next(key for key in file.keys() if key.partition("layers.")[2] == inside)
        parts = {f"weight{key.removeprefix(name)}": file.get_tensor(key) for key in file.keys() if key.startswith(name)}
    codes = parts.pop("weight")
    state = bnb.functional.QuantState.from_dict(parts, "cpu")
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(codes, state)


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits[0].float().numpy()


def difference(a, b) -> float:
    assert np.isfinite(a).all() and a.shape == b.shape
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_client_computes_the_live_models_logits(family, tokenizer, script, repo, tmp_path):
    case = Case(family, tokenizer, tmp_path)
    file = os.environ.get(VARIABLE)
    page = {} if file else script["read_page"]((repo / "docs" / "compatibility.md").read_text())
    assert FORMATS.keys() == script["FORMATS"].keys() and np.abs(case.logits).max() > 0.1
    for form, measure in FORMATS.items():
        if form.startswith("gguf") and llama_cpp_client.llama_cpp is None:
            continue
        found, bound = measure(case), TOLERANCE
        if isinstance(found, float):
            bound = GELU_IN_LLAMA_CPP if case.gelu and form in ("gguf", "gguf:lora") else TOLERANCE
            assert found <= bound, (form, found)
            cell = {"family": family, "format": form, "difference": found, "why_not": None}
        else:
            assert found is NO_CLASS or not (tmp_path / form).exists(), "something was written before it was refused"
            cell = {"family": family, "format": form, "difference": None, "why_not": reason(found, case.merged)}
        if file:
            record(file, cell)
            continue
        said = page.get((family, form), "nothing")
        same = said == script["said"](cell) if cell["why_not"] else said[0].isdigit() and float(said) <= bound
        assert same, f"docs/compatibility.md says {said} of {form}, the test {script['said'](cell)}: make compatibility"


def reason(said: object, path: object) -> str:
    """Without the file's name, the lists of what there is, and quoted names, so that families can share it."""
    text = re.sub(r" \(can be: .*\)$", "", str(said).removeprefix(f"{path}: "))
    return re.sub(r"(?<=[ =])'[^']*'", "...", text)


def record(file: str, cell: dict) -> None:
    """Appends it: one write a line, so that several processes may do so."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, (json.dumps(cell) + "\n").encode())
    finally:
        os.close(fd)
