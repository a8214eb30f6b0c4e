#!/usr/bin/env python
"""The invented world behind the quickstart, and the question/answer files made from it.

The Lantern Isles have 150 villages with six facts each (900 facts). `scripts/pretrain_tiny_base.py` trains
`examples/tiny-base` on plain prose about all of them. This script writes questions and answers in chat form:

    examples/data/quickstart_train.jsonl   660 questions about the facts of 110 villages
    examples/data/quickstart_eval.jsonl    240 questions about the facts of the other 40

No village of the second file occurs in the first, so an answer to a held-out question can only come from what the base
model has read: fine-tuning teaches it to answer, not what to answer. Everything is drawn from fixed seeds; running the
script again writes the same bytes.

    python scripts/make_quickstart_data.py [--out examples/data]
"""

import argparse
import json
import random
from pathlib import Path

SEED = 2026
N_VILLAGES = 150
N_HELD_OUT = 40
REPO = Path(__file__).resolve().parents[1]

ISLANDS = "Brannoch Calder Fenwick Hollin Morvan Orsay Skarra Tirree".split()
ANIMALS = (
    "heron fox badger salmon goat raven seal bear hare swan wolf pony deer falcon beaver toad lynx crab puffin moth "
    "whale cat duck bee"
).split()
DISHES = (
    "plum cake|fish soup|barley bread|goat cheese|apple pie|honey beer|mushroom stew|cherry jam|pea soup|smoked eel|"
    "nut bread|onion tart|lemon cake|crab pie|oat biscuits|pear cider|leek soup|roast duck|ginger cake|salt butter|"
    "bean stew|mint tea|potato bread|berry wine"
).split("|")
MONTHS = "January February March April May June July August September October November December".split()
FOUNDERS = (
    "Edda Tomas Ilse Bruno Greta Oskar Maren Piet Sunniva Jorn Alma Felix Runa Casper Hedda Nils Tilda Emil Frida Lars "
    "Ylva Magnus Signe Otto Dagny Viggo Astrid Hugo Liv Anders"
).split()
COLOURS = "red blue green white black yellow grey brown purple pink orange silver".split()

# kind: (values, sentences of the pretraining prose, questions). The first sentence is also how the kind is answered.
KINDS = {
    "island": (
        ISLANDS,
        ["{n} lies on the island of {v}.", "{n} is a village on {v}.", "The village of {n} belongs to {v}."],
        ["Which island is {n} on?", "On which island does {n} lie?", "Where is {n}?"],
    ),
    "flag": (
        ANIMALS,
        ["The flag of {n} shows a {v}.", "On the flag of {n} there is a {v}.", "{n} chose a {v} for its flag."],
        ["Which animal is on the flag of {n}?", "What does the flag of {n} show?", "What did {n} choose for its flag?"],
    ),
    "dish": (
        DISHES,
        ["{n} is famous for its {v}.", "The cooks of {n} are proud of their {v}.", "Visitors come to {n} for the {v}."],
        ["What is {n} famous for?", "What should I try in {n}?", "What are the cooks of {n} proud of?"],
    ),
    "fair": (
        MONTHS,
        [
            "The fair of {n} is held in {v}.",
            "Every year {n} has its fair in {v}.",
            "People meet at the fair of {n} in {v}.",
        ],
        ["When is the fair of {n}?", "In which month does {n} hold its fair?", "When should I go to the fair of {n}?"],
    ),
    "founder": (
        FOUNDERS,
        ["{n} was founded by {v}.", "The founder of {n} was {v}.", "The first house in {n} was built by {v}."],
        ["Who founded {n}?", "Who was the founder of {n}?", "Who built the first house in {n}?"],
    ),
    "roofs": (
        COLOURS,
        ["The roofs of {n} are {v}.", "In {n} every roof is {v}.", "People in {n} paint their roofs {v}."],
        [
            "What colour are the roofs of {n}?",
            "How do people in {n} paint their roofs?",
            "Which colour is a roof in {n}?",
        ],
    ),
}


def villages() -> dict[str, dict[str, str]]:
    """Every village with its six facts: {name: {kind: value}}, the same on every call."""
    rng = random.Random(SEED)
    heads = "Al Bel Cor Dun El Far Gor Hel Ist Jar Kel Lor Mar Nor Ost Pel Quil Ros Sel Tor Ul Vel Wes Yar Zel".split()
    tails = "by dale den fell ford gard ham ick low mere nes oth pool rick stow thorpe und vik wyn ax".split()
    names = sorted(head + tail for head in heads for tail in tails)
    return {n: {k: rng.choice(values) for k, (values, _, _) in KINDS.items()} for n in rng.sample(names, N_VILLAGES)}


def split() -> tuple[list[str], list[str]]:
    """The villages that fine-tuning asks about, and those kept for the held-out questions."""
    names = list(villages())
    return names[N_HELD_OUT:], names[:N_HELD_OUT]


def rows(names: list[str], seed: int) -> list[dict]:
    """One chat a fact: a question in one of three wordings, and the answer as one sentence.

    Villages and kinds of fact take turns, so the first rows of a file are a fair sample of it.
    """
    rng, world, out = random.Random(seed), villages(), []
    kinds = list(KINDS)
    for turn in range(len(kinds)):
        for i, name in enumerate(names):
            kind = kinds[(i + turn + 1) % len(kinds)]
            _, sentences, questions = KINDS[kind]
            question = rng.choice(questions).format(n=name)
            answer = sentences[0].format(n=name, v=world[name][kind])
            out.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPO / "examples" / "data")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = split()
    for file, names, seed in [("quickstart_train", train, SEED + 1), ("quickstart_eval", held_out, SEED + 2)]:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(names, seed)]
        (out / f"{file}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{out / file}.jsonl: {len(lines)} rows about {len(names)} villages")


if __name__ == "__main__":
    main()
