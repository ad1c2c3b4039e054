"""Children in the programs that people serve them with, against transformers: greedy tokens, log-probs, KV-cache space.

    python benchmarks/engines.py vllm --python /tmp/venvs/vllm/bin/python        children of SmolLM2-135M
    python benchmarks/engines.py vllm --python ... --parent tiny                 random topologies of a tiny random parent
    python benchmarks/engines.py vllm --python ... --packed                      children of SmolLM2-135M with precisions

The engine runs in an environment of its own (docs/export.md says how to make it), on the CPU, in fp32. Each child of
benchmarks/engine_children.py that the engine serves is exported by `nas export` and must give the same 24 greedy tokens and
log-probs within 2e-3 of transformers'; the others must be refused by `nas export`. Status 1 if one of them fails.

With `--packed` the reference is our own rounded model, in fp32. Children of fp8 are run in fp32, too; kernels for integers know
bf16 alone. Inputs that are rounded make much of small differences: log-probs must in the mean be no further from the reference than
twice what our own model is with its embedding changed by a millionth, or in bf16. What the engine has no kernel for on this machine
is printed as such.

The same file is the program that runs inside the engine's environment, so that it imports nothing of ours at the top.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LARGEST_DIFFERENCE = 2e-3  # nats
GIB = 2**30
ANSWER = "answer: "  # what begins the lines that are meant for us, among those that engines print


Worker = Callable[[str, dict[str, Any]], dict[str, Any]]


def run_vllm(path: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Inside vLLM's environment: tokens, log-probs, and how many tokens fit a GiB of KV cache."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if asked["trust"]:
        os.environ["VLLM_PLUGINS"] = ""  # without ours, by the code in the checkpoint
    import vllm
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.distributed import cleanup_dist_env_and_memory

    small = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4, "seed": 0}
    model = LLM(path, dtype=asked["dtype"], trust_remote_code=asked["trust"], **small)
    greedy = SamplingParams(temperature=0, max_tokens=len(asked["tokens"]), ignore_eos=True)
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    tokens = model.generate([TokensPrompt(prompt_token_ids=asked["prompt"])], greedy)[0].outputs[0].token_ids
    entries = model.generate([TokensPrompt(prompt_token_ids=asked["text"])], scored)[0].prompt_logprobs
    cache = model.llm_engine.vllm_config.cache_config
    answer = {
        "tokens": list(tokens),
        "log_probs": [entry[token].logprob for entry, token in zip(entries[1:], asked["text"][1:], strict=True)],
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "block": cache.block_size,
        "version": vllm.__version__,
    }
    del model
    cleanup_dist_env_and_memory()
    return answer


WORKERS: dict[str, Worker] = {"vllm": run_vllm}


def inside(engine: str, questions: Path) -> None:
    """What the engine's own Python runs: answers as JSON lines, one child after the other."""
    for asked in json.loads(questions.read_text()):
        try:
            answer = WORKERS[engine](asked["path"], asked)
        except Exception as error:  # of any kind: engines have their own
            if not asked["packed"]:
                raise
            answer = {"error": " ".join(str(error).split())}
        print(ANSWER + json.dumps(answer), flush=True)


def compare(
    engine: str, python: Path, parent: str, work_dir: Path, only: str, as_is: bool, trust: bool, packed: bool
) -> bool:
    """Prints a row a child; whether all are as they must be."""
    from engine_children import REFERENCE, make_children

    from blocks.engines import ENGINES
    from blocks.errors import UnsupportedModelError
    from nas.export import export_child, open_child
    from nas.packed_export import Packing
    from nas.progress import Reporter

    questions, good = [], True
    for path in make_children(work_dir, parent, packed):
        if only not in path.name:
            continue
        out = work_dir / "exports" / engine / (f"{path.name}.gguf" if ENGINES[engine].gguf else path.name)
        try:
            if as_is:
                out = path
            else:
                run = _text_of(work_dir, path)
                export_child(open_child(path), engine, out, Reporter(quiet=True), packing=Packing(run=run))
        except UnsupportedModelError as error:
            print(f"{path.name:<28} refused: {str(error).partition(': ')[2]}", flush=True)
            continue
        asked = json.loads((path / REFERENCE).read_text())
        how = {"packed": packed, "dtype": "bfloat16" if "@int" in str(asked["layers"]) else "float32"}
        questions.append(asked | how | {"trust": trust, "path": str(out), "name": path.name})
    print(f"{'child':<28}{'layers':>7}{'tokens':>8}{'largest |dlogp|':>17}{'KV tokens/GiB':>15}{'formula':>10}")
    for asked, found in zip(questions, answers(engine, python, questions), strict=True):
        good &= row(engine, asked, found)
    return good


def _text_of(work_dir: Path, path: Path) -> Path:
    """A run with the reference's text alone, to calibrate on."""
    import numpy as np
    from engine_children import REFERENCE

    (work_dir / "text" / "data").mkdir(parents=True, exist_ok=True)
    text = json.loads((path / REFERENCE).read_text())["text"]
    np.save(work_dir / "text" / "data" / "fit.npy", np.array([text], dtype=np.uint16))
    return work_dir / "text"


def row(engine: str, asked: dict[str, Any], found: dict[str, Any]) -> bool:
    """Prints how a child did; whether it is as it must be."""
    from nas.export import open_child

    if "error" in found:
        print(f"{asked['name']:<28} not loaded: {found['error'][:200]}", flush=True)
        return True
    differences = [abs(a - b) for a, b in zip(found["log_probs"], asked["log_probs"], strict=True)]
    difference, mean = max(differences), sum(differences) / len(differences)
    same = sum(a == b for a, b in zip(found["tokens"], asked["tokens"], strict=True))
    child = None if asked["path"].endswith(".gguf") else open_child(Path(asked["path"]))
    fits, formula = kv_tokens_fit(child, found, asked["dtype"]) if "kv_tokens" in found else (True, "")
    fine = same == len(asked["tokens"]) and difference <= LARGEST_DIFFERENCE and fits
    note = ""
    if asked["packed"]:
        fine = mean <= max(2 * asked["noise"], LARGEST_DIFFERENCE) and fits
        note = f", in the mean {mean:.1e}, our own noise {asked['noise']:.1e}"
    print(
        f"{asked['name']:<28}{len(child.architecture) if child else '':>7}{same:>5}/{len(asked['tokens'])}{difference:>17.1e}"
        f"{found.get('kv_tokens', ''):>15}{formula:>10}  {'as it must be' if fine else 'WRONG'} "
        f"({engine} {found['version']}, {asked['dtype']}{note})",
        flush=True,
    )
    return fine


def kv_tokens_fit(child: Any, found: dict[str, Any], dtype: str) -> tuple[bool, str]:
    """Whether an engine's own count of tokens in a GiB is ours, but for one block of every layer."""
    from nas.costs import CostModel, Scenario

    costs = CostModel(child.shape, Scenario(batch=1, context=2, kv_dtype=dtype))
    ours = GIB * 2 / sum(map(costs.layer_kv_bytes, child.architecture))
    return abs(ours - found["kv_tokens"]) <= found["block"], f"{ours:,.0f}"


def answers(engine: str, python: Path, questions: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Runs the children in the engine's environment, one after the other. Raises CalledProcessError, its log on the terminal."""
    with tempfile.TemporaryDirectory() as directory:
        asked, log = Path(directory) / "questions.json", Path(directory) / "log"
        asked.write_text(json.dumps(questions))
        command = [str(python), str(Path(__file__).resolve()), "--inside", engine, str(asked)]
        with (
            log.open("w") as stderr,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as run,
        ):
            assert run.stdout is not None
            for line in run.stdout:
                if line.startswith(ANSWER):
                    yield json.loads(line.removeprefix(ANSWER))
        if run.returncode:
            sys.stderr.write(log.read_text()[-8000:])
            raise subprocess.CalledProcessError(run.returncode, command)


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        return inside(sys.argv[2], Path(sys.argv[3]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", choices=sorted(WORKERS))
    parser.add_argument("--python", type=Path, required=True, help="of the engine's environment")
    parser.add_argument("--parent", default="smollm2")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "engine-children")
    parser.add_argument("--only", default="", help="part of a child's name")
    parser.add_argument("--as-is", action="store_true", help="without nas export: to see what the engine trips over")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="vllm: by the child's own code, not by our plugin"
    )
    parser.add_argument("--packed", action="store_true", help="children with precisions")
    got = parser.parse_args()
    good = compare(got.engine, got.python, got.parent, got.work, got.only, got.as_is, got.trust_remote_code, got.packed)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
