"""Does fine-tuning in fp8 end where bf16 ends, on a model of 124 M parameters trained on real text?

    python benchmarks/fp8_quality_100m prepare --text CORPUS... --train train.jsonl --test test.jsonl
        --tokenizer FOLDER --out tokens.npz
    python benchmarks/fp8_quality_100m run --tokens tokens.npz [--seeds 1 2 3] [--out fp8_quality_100m.jsonl] [--small]
    python benchmarks/fp8_quality_100m plot [--records fp8_quality_100m.jsonl] [--picture fp8_quality_100m.svg]

`prepare` (prepare.py says what it reads) needs transformers; `run` does not, only a GPU that multiplies fp8. It
pretrains a Llama on the corpus, quantises it to NF4, fine-tunes LoRA on the questions with each seed in bf16 and in fp8
(a seed fixes the adapter's start and the order of the data), once more in bf16 with another adapter, and compares
outputs and gradients with float32. Where one linear's fp8 error is more than 1.5 times the others', every seed runs
again with that one kept in bf16. A record is appended after every part. --small: a tiny model and few steps, to try it
on a CPU.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

RECORDS = Path(__file__).resolve().parents[1] / "fp8_quality_100m.jsonl"
OTHER_ADAPTER = 101  # the seed of the second adapter on the first seed's data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    prepare = stages.add_parser("prepare")
    prepare.add_argument("--text", type=Path, nargs="+", required=True)
    for option in ("--train", "--test", "--tokenizer", "--out"):
        prepare.add_argument(option, type=Path, required=True)
    prepare.add_argument("--max-length", type=int, default=1024)
    run = stages.add_parser("run")
    run.add_argument("--tokens", type=Path, required=True)
    run.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    run.add_argument("--out", type=Path, default=RECORDS)
    run.add_argument("--keep", help="the linear to keep in bf16 in a third arm, whatever the errors say")
    run.add_argument("--small", action="store_true")
    plot = stages.add_parser("plot")
    plot.add_argument("--records", type=Path, default=RECORDS)
    plot.add_argument("--picture", type=Path, default=RECORDS.with_suffix(".svg"))
    arguments = parser.parse_args()
    if arguments.stage == "prepare":
        from prepare import prepare

        a = arguments
        print(prepare(a.text, a.train, a.test, a.tokenizer, a.max_length, a.out))
    elif arguments.stage == "run":
        from experiment import FULL, SMALL, experiment

        with np.load(arguments.tokens) as tokens:
            tokens = dict(tokens)
        command = " ".join(["python", "benchmarks/fp8_quality_100m", *sys.argv[1:]])
        scale = SMALL if arguments.small else FULL
        experiment(tokens, scale, arguments.seeds, arguments.keep, OTHER_ADAPTER, arguments.out, command)
    else:
        from plot import draw

        draw(arguments.records, arguments.picture)
        print(arguments.picture)


if __name__ == "__main__":
    main()
