"""A small real tokenizer, trained here, so that these tests need no download and no shared data."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "You are a helpful assistant. Hello world, how are you today?",
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "The user asks the assistant a question; the assistant answers it, and the answer is 42.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "ASSISTANT: hello USER: world ### Response: ### Instruction:",
]
MARKERS = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]", "[/INST]", "<think>", "</think>",
]  # fmt: skip


def build_tokenizer(markers=MARKERS, bos: str | None = "<s>", **special) -> PreTrainedTokenizerFast:
    """Byte-level BPE as Llama 3 and Qwen have it, trimmed offsets included: the hard case for a mask."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    names = ["<s>", "</s>", *markers]
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(names),
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    steps = [processors.ByteLevel(trim_offsets=True)]
    if bos:
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, 0)]))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"bos_token": bos} if bos else {}), **special)


# A template that says itself what is trained.
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>\n"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
