"""What the README's first command promises, done for real: it learns the task, and PEFT gives the same answers."""

import re

import numpy as np
import pytest
import torch

from fastft_jax import sft


@pytest.fixture(scope="module")
def quickstart(repo, tmp_path_factory):
    """(the adapter's folder, everything that was printed)."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        printed = []
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
        code = sft.main(["--config", "configs/quickstart.yaml", f"training.output_dir={folder}"])
    assert code == 0
    return folder, "\n".join(printed)


def test_exact_match_goes_from_under_10_to_over_80_percent(quickstart):
    _, printed = quickstart
    before, after = (float(x) for x in re.findall(r"exact match \w+ training: ([\d.]+)%", printed))
    assert before < 10
    assert after > 80
    assert printed.count("question: ") == printed.count("before: ") == printed.count("after:  ") == 3
    assert "equal to the bit" in printed


def test_peft_and_transformers_answer_as_we_do(quickstart, repo):
    """On the base that was trained against: its linears as NF4 decodes them, in float32."""
    import peft
    import transformers

    from fastft_jax import FastLanguageModel
    from fastft_jax.models.lora import sites
    from fastft_jax.quant.nf4 import NF4Array, dequantize

    folder, _ = quickstart
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)  # the adapter names its base as the config did
        ours, tokenizer = FastLanguageModel.from_pretrained(folder, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(repo / "examples" / "tiny-base", dtype=torch.float32)
    modules = dict(theirs.named_modules())
    for site in sites(ours.decoder, ours.names):
        stack = site.linear.weight.get_value()
        one = NF4Array(
            *(leaf[site.row] for leaf in (stack.codes, stack.absmax, stack.absmax_scale)),
            stack.absmax_offset[site.row],
            stack.shape,
        )
        modules[site.hf_path].weight.data = torch.tensor(np.asarray(dequantize(one, np.float32)))
    theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
    for question in ("What does the flag of Dunax show?", "When should I go to the fair of Marund?"):
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt])).logits.numpy()
            out = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=-1)
        np.testing.assert_allclose(np.asarray(ours(np.array([prompt]))), logits, atol=1e-4, rtol=0)
        assert ours.generate([prompt], max_new_tokens=20)[0] == out[0, len(prompt) :].tolist()
