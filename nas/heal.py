"""`nas distill`: heals the run's child by distillation from the parent and writes it.

The child that `nas search` assembled is read from child/, trained in distill/ (resumable), and written to healed/ in the
budget's dtype. The table that `nas show` prints is in results.json.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from blocks.checkpoint import as_built, load_child, read_architecture, write_child
from blocks.errors import CheckpointError
from blocks.files import save_json
from blocks.parent import Parent
from blocks.spec import Architecture
from distill.config import DistillConfig
from distill.progress import HealResult, Progress
from distill.trainer import heal
from nas.config import to_dict
from nas.data import load_pack
from nas.measure import load_parent_model, measure
from nas.progress import Reporter
from nas.run import Run, digest

SAMPLE_PROMPT = "The with statement in Python"
SAMPLE_TOKENS = 48


def run_distill(
    run: Run, parent: Parent, config: DistillConfig, device: torch.device, reporter: Reporter
) -> dict[str, Any]:
    """Does what is missing of `nas distill` and returns the results (results.json)."""
    found = run.read("architecture.json", "search")
    key = digest(found["key"], to_dict(config))
    if run.has("results.json") and run.has("healed/config.json"):
        done = run.read("results.json", "distill")
        if done.get("key") == key:
            reporter.say(f"This child is healed already: {run.path('healed')}")
            return done
    _set_aside_other_child(run, found["key"], reporter)
    architecture = Architecture.load(run.path("architecture.json"))
    healing = _heal(run, parent, architecture, config, found, device, reporter)
    heldout = measure(
        parent, {"healed": run.path("healed")}, load_pack(run.path("data") / "heldout.npy"), device, reporter
    )
    rows = _rows(found, heldout)
    result = {
        "key": key,
        "search": found["key"],
        "rows": rows,
        "heldout_tokens": heldout["tokens"],
        "healing": {
            "tokens": healing.tokens,
            "steps": healing.steps,
            "best_step": healing.best_step,
            "seconds": round(healing.seconds, 1),
            "tokens_per_s": round(healing.tokens_per_s, 1),
            "before": healing.before.to_dict(),
            "best": healing.best.to_dict(),
        },
        "sample": sample_text(run.path("healed"), parent, device),
    }
    save_json(run.path("results.json"), result)
    return result


def _set_aside_other_child(run: Run, search: str, reporter: Reporter) -> None:
    """Keeps what was healed for an earlier search under its own name, and notes which search distill/ is for.

    What was kept for this search before is taken up again.
    """
    marker = "distill/search.json"
    earlier = run.read(marker, "distill").get("search") if run.has(marker) else None
    if earlier not in (None, search):
        for name in ("distill", "healed"):
            if run.has(name):
                run.path(name).rename(run.path(f"{name}-{earlier}"))
            if run.has(f"{name}-{search}"):
                run.path(f"{name}-{search}").rename(run.path(name))
        reporter.say(f"The healing of an earlier search is kept in {run.path(f'distill-{earlier}')}")
    save_json(run.path(marker), {"search": search})


def _heal(
    run: Run,
    parent: Parent,
    architecture: Architecture,
    config: DistillConfig,
    found: dict[str, Any],
    device: torch.device,
    reporter: Reporter,
) -> HealResult:
    if read_architecture(run.path("child"))[1] != as_built(parent.shape, architecture)[1]:
        raise CheckpointError(
            f"{run.path('child')} is not the child of architecture.json (a search was cut off?); run `nas search` again"
        )
    data = run.path("data")
    teacher, student = load_parent_model(parent, device), load_child(run.path("child"))
    with reporter.bar("Healing", config.steps) as (bar, task):

        def on_step(progress: Progress) -> None:
            note = f"KL {progress.loss:.3f}  {progress.tokens_per_s:,.0f} tokens/s" if progress.step else ""
            bar.update(task, completed=progress.step, note=note)
            if progress.evaluation is not None:
                e = progress.evaluation
                bar.console.print(
                    f"  step {progress.step}: held-out KL {e.kl:.4f}, perplexity {e.student_perplexity:.2f}",
                    highlight=False,
                )

        train, heldout = load_pack(data / "train.npy"), load_pack(data / "heldout.npy")
        result = heal(config, teacher, student, train, heldout, run.path("distill"), on_step=on_step)
    write_child(run.path("healed"), parent.path, architecture, student.state_dict(), found["scenario"]["weight_dtype"])
    return result


def _rows(found: dict[str, Any], healed: dict[str, Any]) -> list[dict[str, Any]]:
    """The table: parent, uniform baseline, child before and after healing; all on the same held-out text."""
    heldout = found["heldout"]
    rows = [_row("parent", found["parent_cost"], {"kl": 0.0, "top1_agreement": 1.0, **heldout["parent"]})]
    if found["uniform_cost"] is not None:
        rows.append(_row("uniform baseline", found["uniform_cost"], heldout["uniform"]))
    rows.append(_row("child before healing", found["cost"], heldout["child"]))
    rows.append(_row("child after healing", found["cost"], healed["healed"]))
    return rows


def _row(name: str, cost: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "parameters": cost["parameters"], "gb": cost["gb"], **measured}


def sample_text(path: Path, parent: Parent, device: torch.device) -> dict[str, str]:
    """A greedy continuation by the child at `path`."""
    tokenizer = parent.tokenizer()
    child: Any = load_child(path, device=device)
    prompt = tokenizer(SAMPLE_PROMPT, return_tensors="pt").to(device)
    with torch.no_grad():
        output = child.generate(
            prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
    return {"prompt": SAMPLE_PROMPT, "text": str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]))}


def forget_healing(run: Run) -> None:
    """Removes what an earlier `nas distill` left, for --restart."""
    for name in ("distill", "healed"):
        shutil.rmtree(run.path(name), ignore_errors=True)
    run.path("results.json").unlink(missing_ok=True)
