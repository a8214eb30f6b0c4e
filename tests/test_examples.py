"""The quickstart's files: what they promise about each other, and that other tools read them alike."""

import importlib.util
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

MAX_BYTES = 6_000_000
FACTS = re.compile(
    r"(?P<island>(\w+) lies on the island of (\w+)\.)|(?P<flag>The flag of (\w+) shows a (\w+)\.)"
    r"|(?P<dish>(\w+) is famous for its ([\w ]+)\.)|(?P<fair>The fair of (\w+) is held in (\w+)\.)"
    r"|(?P<founder>(\w+) was founded by (\w+)\.)|(?P<roofs>The roofs of (\w+) are (\w+)\.)"
)


@pytest.fixture(scope="module")
def base(repo: Path) -> Path:
    return repo / "examples" / "tiny-base"


@pytest.fixture(scope="module")
def data_script(repo: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_quickstart_data", repo / "scripts" / "make_quickstart_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(base: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(base))


def chats(repo: Path, name: str) -> list[list[dict[str, str]]]:
    lines = (repo / "examples" / "data" / f"quickstart_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def read_fact(answer: str) -> tuple[str, str, str]:
    """(village, kind, value) of an answer's sentence."""
    match = FACTS.fullmatch(answer)
    assert match, answer
    _, village, value = (group for group in match.groups() if group)
    return village, match.lastgroup, value


def facts(repo: Path, name: str) -> dict[tuple[str, str], str]:
    """{(village, kind): value}, read off the answers."""
    read = (read_fact(answer["content"]) for _, answer in chats(repo, name))
    return {(village, kind): value for village, kind, value in read}


def test_tiny_base_folder_stays_within_six_megabytes(base):
    assert sum(path.stat().st_size for path in base.rglob("*") if path.is_file()) <= MAX_BYTES


def test_tokenizer_renders_chats_that_encode_to_single_special_tokens_and_decode_back(tokenizer, repo):
    turns = chats(repo, "eval")[0]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    question, answer = (turn["content"] for turn in turns)
    assert rendered == (f"<|begin|><|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n")
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(prompt)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids[:2] == [tokenizer.bos_token_id, 3] and ids.count(3) == ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(ids) == rendered
    text = "Bytes that no corpus held: żółć 🦀\t\x07"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_no_village_is_both_trained_on_and_held_out(repo):
    trained, held_out = facts(repo, "train"), facts(repo, "eval")
    assert (len(trained), len(held_out)) == (660, 240)
    trained_text = json.dumps(chats(repo, "train"))
    for village in {village for village, _ in held_out}:
        assert not re.search(rf"\b{village}\b", trained_text)


def test_each_question_names_the_village_that_its_answer_is_about(repo):
    for name in ("train", "eval"):
        for question, answer in chats(repo, name):
            village, _, _ = read_fact(answer["content"])
            assert re.search(rf"\b{village}\b", question["content"])
            assert (question["role"], answer["role"]) == ("user", "assistant")


def test_guessing_the_commonest_values_of_the_training_file_stays_under_ten_percent(repo):
    counts = defaultdict(Counter)
    for (_, kind), value in facts(repo, "train").items():
        counts[kind][value] += 1
    held_out = facts(repo, "eval")
    guessed = sum(counts[kind].most_common(1)[0][0] == value for (_, kind), value in held_out.items())
    assert guessed / len(held_out) < 0.10


def test_data_files_are_what_the_script_writes(data_script, repo, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_quickstart_data.py", "--out", str(tmp_path)])
    data_script.main()
    for name in ("quickstart_train.jsonl", "quickstart_eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (repo / "examples" / "data" / name).read_bytes()


def test_pretraining_text_tells_every_fact_and_asks_about_no_village(data_script, repo, monkeypatch):
    monkeypatch.setitem(sys.modules, "make_quickstart_data", data_script)
    spec = importlib.util.spec_from_file_location("pretrain_tiny_base", repo / "scripts" / "pretrain_tiny_base.py")
    pretrain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pretrain)
    stream = pretrain.documents()
    texts = [next(stream) for _ in range(6000)]
    talk = " ".join(text for text in texts if "<|im_start|>" in text)
    prose = [text.removeprefix("<|begin|>").removesuffix("<|end|>") for text in texts if "<|im_start|>" not in text]
    sentences = {sentence for text in prose for sentence in re.findall(r"[^.]+\.", text.replace("\n", " "))}
    sentences = {sentence.strip() for sentence in sentences}
    assert "?" in talk and not any("?" in sentence for sentence in sentences)
    for village, values in data_script.villages().items():
        assert village not in talk
        for kind, value in values.items():
            assert any(form.format(n=village, v=value) in sentences for form in data_script.KINDS[kind][1])


def test_logits_equal_transformers_on_the_tiny_base(base, tokenizer, repo):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    from fastft_jax import FastLanguageModel

    reference = LlamaForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    model, _ = FastLanguageModel.from_pretrained(str(base), max_seq_length=128, load_in_4bit=False, dtype="float32")
    rendered = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in chats(repo, "eval")[:6]]
    batch = tokenizer(rendered, add_special_tokens=False, padding=True, return_tensors="np")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        wanted = reference(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    got = np.asarray(model(ids, attention_mask=mask))
    # The same float32 arithmetic, summed in another order
    np.testing.assert_allclose(got[mask == 1], wanted[mask == 1], atol=1e-4)


def test_base_completes_held_out_facts_as_prose_when_read_by_transformers(base, tokenizer, repo):
    """The knowledge that the quickstart draws on is in the published weights."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    answers = [turns[1]["content"] for turns in chats(repo, "eval")]
    batch = tokenizer(answers, padding=True, return_tensors="pt")  # the tokenizer puts BOS first, as in pretraining
    with torch.no_grad():
        predicted = reference(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits.argmax(-1)
    right = []
    for ids, guess, sentence in zip(batch["input_ids"], predicted, answers, strict=True):
        value = " " + read_fact(sentence)[2]
        n = len(tokenizer(sentence.removesuffix(value + "."))["input_ids"])
        m = len(tokenizer(value, add_special_tokens=False)["input_ids"])
        right.append(bool((guess[n - 1 : n + m - 1] == ids[n : n + m]).all()))
    assert np.mean(right) > 0.95
