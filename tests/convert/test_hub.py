"""From a name to a folder: local paths, and a hub played by a local HTTP server with the hub's own headers."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastft_jax.convert.hub import resolve_model
from fastft_jax.errors import CheckpointError, ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.model": b"t",
    "chat_template.jinja": b"c",
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": b"code",
    "consolidated.safetensors": b"the same weights again",
    "original/params.json": b"{}",
}


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub: repository info, the list of its files, and the files."""

    fetched: list[str] = []

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/gated"):
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if path.startswith("/api/models/org/private") and "Authorization" not in self.headers:
            return self.answer(401, X_Error_Code="RepoNotFound")
        if path.startswith("/api/models/org/broken"):
            return self.answer(500)
        if path.startswith("/api/models/org/badtoken"):
            return self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        if not path.startswith(("/api/models/org/good", "/api/models/org/private", "/org/good", "/org/private")):
            return self.answer(404, X_Error_Code="RepoNotFound")
        if path.endswith("/revision/none"):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in FILES.items()
            ]
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        if path.startswith("/api/"):
            name = path.removeprefix("/api/models/").partition("/revision")[0]
            siblings = [{"rfilename": file} for file in FILES]
            info = {"id": name, "sha": COMMIT, "siblings": siblings}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        file = path.partition("/resolve/")[2].partition("/")[2]
        if self.command == "GET":
            self.fetched.append(file)
        return self.answer(200, FILES[file], ETag=f'"{hashlib.sha1(FILES[file]).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


CHILD = """
import json, sys
from fastft_jax.convert.hub import resolve_model
from fastft_jax.errors import CheckpointError
answers = []
for name, options in json.loads(sys.argv[1]):
    try:
        answers.append(["folder", str(resolve_model(name, **options))])
    except CheckpointError as error:
        answers.append(["error", str(error)])
print(json.dumps(answers))
"""


@pytest.fixture
def ask(server, tmp_path):
    """Resolves names in a fresh process, because the hub's client reads its environment when it is imported."""

    def ask(*cases, **environment):
        clean = {
            key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
        }
        clean |= {"HF_ENDPOINT": server, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        child = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(cases)],
            env=clean | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert child.returncode == 0, child.stderr
        return json.loads(child.stdout)

    return ask


def refused(word, name):
    with pytest.raises(CheckpointError, match=word) as caught:
        resolve_model(name)
    assert os.fspath(name) in str(caught.value)


def test_a_folder_that_exists_is_returned_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("org/model") == Path("org/model")
    assert resolve_model("~/org/model") == resolve_model(tmp_path / "org" / "model") == tmp_path / "org" / "model"
    with pytest.raises(ConfigError, match="revision='main' is for hub ids"):
        resolve_model("org/model", revision="main")


@pytest.mark.parametrize("name", ["./model", "/absent", "/a/b", "~/absent", "a/b/c", "org/mo del", "a--b", "é"])
def test_a_name_that_can_only_be_a_path_is_refused_without_a_network(name):
    refused("is no folder .looked at /.*and no hub id like", name)


def test_a_path_object_is_never_a_hub_id_and_a_file_is_no_folder(tmp_path):
    refused("does not exist", Path("org/model"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused("is a file: pass the folder", tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="name is empty"):
        resolve_model("")


def test_only_weights_and_tokenizer_files_are_downloaded_and_the_second_time_nothing_is(ask):
    Hub.fetched.clear()
    (kind, folder), again = ask(["org/good", {}], ["org/good", {"revision": "main"}])
    wanted = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.model"]
    assert kind == "folder" and sorted(os.listdir(folder)) == wanted == sorted(Hub.fetched)
    assert (Path(folder) / "model.safetensors").read_bytes() == b"weights" and again == ["folder", folder]

    # offline the cache answers, and what it lacks is told
    cached, absent = ask(["org/good", {}], ["org/other", {}], HF_HUB_OFFLINE="1")
    assert cached == ["folder", folder]
    assert "HF_HUB_OFFLINE is set and the hub's cache does not have it in full" in absent[1]
    assert "Download it first" in absent[1]

    # without a network (nobody listens on the discard port) likewise
    cached, absent = ask(["org/good", {}], ["org/other", {}], HF_ENDPOINT="http://127.0.0.1:9")
    assert cached == ["folder", folder]
    assert "the hub cannot be reached and its cache does not have it in full" in absent[1]


def test_access_problems_are_told_apart(ask):
    words = {
        "org/gated": "is gated: accept its terms on the hub",
        "org/absent": "no repository on the hub that you can see",
        "org/private": "for a private one pass token",
        "org/badtoken": "status 401: the token is not valid",
    }
    *answers, revision, private = ask(
        *([name, {}] for name in words),
        ["org/good", {"revision": "none"}],
        ["org/private", {"token": "hf_x"}],
    )
    for (name, word), (kind, message) in zip(words.items(), answers, strict=True):
        assert kind == "error" and name in message and word in message and message.count("\n") <= 1, message
    assert "org/good has no revision 'none' on the hub" in revision[1]
    assert private[0] == "folder" and private[1].endswith(COMMIT)


def test_a_full_disk_while_downloading_is_a_checkpoint_error(monkeypatch):
    import huggingface_hub

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    refused("could not be downloaded: OSError.*No space left", "org/good")
