"""The export command, the export section of a run, and the upload: from an adapter to what others read."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import yaml

from fastft_jax import FastLanguageModel
from fastft_jax.config import load_config
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.export import main

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def command(capsys, monkeypatch, xla_cache):
    """`command("--adapter", ...)`: exit code, what was printed, what was complained of."""
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "TF_CPP_MIN_LOG_LEVEL", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "0.93" if name.startswith("XLA") else "2")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_a_run_exports_what_its_config_says_and_the_command_does_so_again(cli, command, run_config, repo, tmp_path):
    changes = {"export": {"to": ["merged_16bit"], "dtype": "float32"}, "lora": {"modules_to_save": ["lm_head"]}}
    changes["training"] = {"max_steps": 1}
    ran = cli("--config", run_config(changes))
    assert ran.code == 0, ran.err
    out = tmp_path / "out"
    line = ran.out.splitlines()[-1]
    assert line.startswith(f"merged_16bit: {out}/export/merged_16bit: 1 file") and "read back: |logit diff" in line

    base, merged = repo / "examples" / "tiny-base", out / "export" / "merged_16bit"
    assert {p.name for p in merged.iterdir()} == {p.name for p in base.iterdir()} | {"README.md"}
    for name in ("generation_config.json", *TOKENIZER):
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    card = (merged / "README.md").read_text()
    for words in (
        f"base_model: {json.dumps(str(base))}",
        "quickstart_train.jsonl",
        "| learning_rate | 0.004 |",
        "| jax |",
    ):
        assert words in card
    assert "| loss | " in card and "|logit difference| max" in card

    again = run_config(changes)
    ran = cli("--config", again, "training.overwrite_output_dir=true")
    assert ran.code == 2 and "merged_16bit exists and is not empty" in ran.err  # before it trains, not after

    arguments = ("--adapter", out, "--to", "peft,merged_16bit", "--dtype", "float32", "--out", tmp_path / "exported")
    (tmp_path / "rows.txt").write_text("What is the capital of France?\n\nA longer line of text, to be padded to.\n")
    code, said, complaints = command(*arguments, "--rows", tmp_path / "rows.txt")
    assert code == 0, complaints
    assert [text.split(":")[0] for text in said.splitlines()] == ["peft", "merged_16bit"]
    assert "vLLM would not serve this adapter (modules_to_save=['lm_head']" in complaints
    same = (tmp_path / "exported" / "merged_16bit" / "model.safetensors").read_bytes()
    assert same == (merged / "model.safetensors").read_bytes()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "exported" / "peft" / name).read_bytes() == (out / name).read_bytes()
    code, _, complaints = command(*arguments)
    assert code == 2 and "exported/peft exists and is not empty" in complaints


# The upload -------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub to be written to: make a repository, ask how to upload, commit."""

    asked: list[str] = []
    files: dict[str, bytes] = {}
    made: dict = {}

    def answer(self, status, **body):
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path)
        here = f"http://{self.headers['Host']}/me/model"
        if self.headers.get("Authorization") != "Bearer hf_write":
            return self.answer(401, error="Invalid credentials")
        if self.path == "/api/repos/create":
            type(self).made = json.loads(body)
            return self.answer(200, url=here, id="me/model", name="me/model")
        if self.path == "/api/validate-yaml":  # the card's front matter
            return self.answer(200, errors=[], warnings=[])
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.answer(200, files=[{"path": path, **how} for path in paths])
        if "/commit/" in self.path:
            for line in body.splitlines():
                part = json.loads(line)
                if part["key"] == "file":
                    self.files[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
            return self.answer(200, commitUrl=f"{here}/commit/1", commitOid="1", hookOutput="")
        return self.answer(404)

    def do_GET(self):
        self.asked.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_write":
            return self.answer(404)
        self.answer(200, id="me/model", sha="0" * 40, siblings=[])

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    here = f"http://127.0.0.1:{server.server_port}"
    real = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **options: real(endpoint=here, **options))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    Hub.asked.clear()
    Hub.files.clear()
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_push_makes_the_repository_and_commits_the_export_with_its_card(hub, repo, tmp_path):
    base = repo / "examples" / "tiny-base"
    model, tokenizer = FastLanguageModel.from_pretrained(base, max_seq_length=128, load_in_4bit=False)
    FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj"])
    (tmp_path / "run.json").write_text(json.dumps({"config": {"data": {"path": "rows.jsonl"}}}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.25}\n{"eval_loss": 3.0}\n')
    with pytest.raises(CheckpointError, match="me/model: the hub answered with status 401: pass a token with write"):
        model.push_to_hub("me/model", tokenizer, token="hf_read")
    with pytest.raises(ConfigError, match="repo_id='me/mo del' is not a hub id"):
        model.push_to_hub("me/mo del", tokenizer, token="hf_write")
    assert hub.files == {}
    url = model.push_to_hub("me/model", tokenizer, token="hf_write", private=True, run=tmp_path, verify=False)
    assert url.endswith("/me/model/commit/1") and "private" in (
        hub.made.get("visibility"),
        *[k for k, v in hub.made.items() if v is True],
    )
    assert set(hub.files) == {"adapter_config.json", "adapter_model.safetensors", "README.md", *TOKENIZER}
    model.save_pretrained(tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert hub.files[name] == (tmp_path / "adapter" / name).read_bytes()
    card = hub.files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == model.name_or_path and front["library_name"] == "peft"
    for words in ("| path | rows.jsonl |", "| loss | 1.25 |", "| eval_loss | 3 |", "| r | 2 |"):
        assert words in card


def test_the_command_refuses_what_it_cannot_do_before_it_loads_anything(command, tmp_path):
    there = tmp_path / "out" / "peft"
    there.mkdir(parents=True)
    (there / "mine").write_text("x")
    fine = ("--adapter", tmp_path / "none", "--out", tmp_path / "out")
    for arguments, code, words in (
        (("--to", "peft,onnx"), 2, "'onnx' is not a form to export to; there are peft, merged_16bit, merged_4bit"),
        (("--to", "merged_16bit:q4_k_m"), 2, "merged_16bit takes nothing after a colon"),
        (("--to", ","), 2, "--to names no form"),
        (("--to", "peft"), 2, "peft exists and is not empty"),
        (("--to", "merged_4bit"), 1, "none"),
    ):
        found, _, complaint = command(*fine, *arguments)
        assert found == code and words in complaint and len(complaint.splitlines()) <= 2, complaint
    assert (there / "mine").read_text() == "x"


@pytest.mark.parametrize(
    ("export", "words"),
    [
        ({"to": ["onnx"]}, "export.to: 'onnx' is not a form to export to"),
        ({"to": ["peft:a"]}, "peft takes nothing after a colon"),
        ({"to": 3}, "export.to is 3; it must be a list"),
        ({"max_shard_size": "5 apples"}, "'5 apples' is not a size"),
        ({"dtype": "int8"}, "export.dtype is 'int8'"),
        ({"save_method": "merged"}, "use to: [merged_16bit]"),
    ],
    ids=str,
)
def test_a_wrong_export_section_is_refused_by_name(export, words, run_config):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(run_config({"export": export}))
    section = load_config(run_config({"export": {"to": "merged_16bit, peft", "max_shard_size": 1000}}))[0].export
    assert section.to == ["merged_16bit", "peft"] and section.folder("run").name == "export"
