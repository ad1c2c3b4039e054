"""`nas distill`: heals the run's child by distillation from the parent and writes it.

The child that `nas search` assembled is read from child/, trained in distill/ (resumable, in one stage or several, on one rank or
many), and written to healed/ in the budget's dtype. The table that `nas show` prints is in results.json. A child with precisions
keeps them: its master weights are written, and what is measured is rounded as they say, beside the master.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from blocks.checkpoint import as_built, load_child, read_architecture, write_child
from blocks.errors import CheckpointError
from blocks.files import save_json
from blocks.parent import Parent
from blocks.ranks import ALONE, Ranks
from blocks.rounded_model import round_model
from blocks.spec import Architecture
from distill.config import DistillConfig
from distill.progress import HealResult, Progress
from distill.stages import Stage, heal_in_stages, stage_names
from nas.config import to_dict
from nas.costs import CostModel, Scenario
from nas.data import DataConfig, load_pack, prepare_data
from nas.measure import load_parent_model, measure
from nas.progress import Reporter
from nas.run import Run, digest
from nas.set_aside import HEALED_FOR, set_aside_other_healing

SAMPLE_PROMPT = "The with statement in Python"
SAMPLE_TOKENS = 48
UNROUNDED = "{}, unrounded"


def run_distill(
    run: Run,
    parent: Parent,
    stages: Sequence[DistillConfig],
    device: torch.device,
    reporter: Reporter,
    ranks: Ranks = ALONE,
) -> dict[str, Any] | None:
    """Does what is missing of `nas distill` and returns the results (results.json); on rank 0, where there are several."""
    found = run.read("architecture.json", "search")
    architecture = Architecture.load(run.path("architecture.json"))
    stages = [config.suited_to(architecture) for config in stages]
    key = digest(found["key"], [to_dict(config) for config in stages])
    if ranks.agree(run.has("results.json") and run.has("healed/config.json")):
        done = run.read("results.json", "distill")
        if done.get("key") == key:
            reporter.say(f"This child is healed already: {run.path('healed')}")
            return done
    if ranks.main:
        set_aside_other_healing(run, found["key"], reporter)
        save_json(run.path(HEALED_FOR), {"search": found["key"]})
    ranks.wait()
    if read_architecture(run.path("child"))[1] != as_built(parent.shape, architecture)[1]:
        raise CheckpointError(
            f"{run.path('child')} is not the child of architecture.json (a search was cut off?); run `nas search` again"
        )
    weight_dtype = found["scenario"]["weight_dtype"]
    results = _heal(run, parent, stages, device, reporter, ranks, getattr(torch, weight_dtype))
    ranks.leave()  # what is left to do takes one rank, and the others need not wait for it
    if not ranks.main:
        return None
    weights = load_file(results[-1].best_path)
    write_child(run.path("healed"), parent.path, architecture, weights, weight_dtype)
    measured = {"healed": run.path("healed")}
    if architecture.rounded:
        measured |= {UNROUNDED.format(name): run.path(name) for name in ("child", "healed")}
    pack = load_pack(run.path("data") / "heldout.npy")
    heldout = measure(parent, measured, pack, device, reporter, unrounded=measured.keys() - {"healed"})
    if (
        heldout["tokens"] != found["heldout"]["tokens"]
    ):  # the search ran on a device that measures more of the text, or less
        before = {name: run.path(name) for name in ("child", "uniform") if run.has(f"{name}/config.json")}
        found = {**found, "heldout": measure(parent, before, pack, device, reporter)}
    before, after = found["heldout"]["child"]["kl"], heldout["healed"]["kl"]
    if after > before and all(config.loss in ("kl", "jsd") for config in stages):
        reporter.say(
            f"  warning: the child is further from the parent than before healing ({after:.4f}, before {before:.4f}); try a "
            "lower --learning-rate or more --tokens"
        )
    result = {
        "key": key,
        "search": found["key"],
        "rows": _rows(found, heldout, _master_cost(found, parent, architecture)),
        "heldout_tokens": heldout["tokens"],
        "healing": _told(results),
        "stages": [
            {"name": name, "config": to_dict(config)} | _told([of])
            for name, config, of in zip(stage_names(stages), stages, results, strict=True)
        ],
        "sample": sample_text(run.path("healed"), parent, device),
    }
    save_json(run.path("results.json"), result)
    return result


def _told(results: Sequence[HealResult]) -> dict[str, Any]:
    """What results.json says of one stage or of all in a row."""
    tokens = sum(result.tokens for result in results)
    return {
        "tokens": tokens,
        "steps": sum(result.steps for result in results),
        "best_step": results[-1].best_step,
        "seconds": round(sum(result.seconds for result in results), 1),
        "tokens_per_s": round(results[-1].tokens_per_s, 1),
        "before": results[0].before.to_dict(),
        "best": results[-1].best.to_dict(),
    }


def _heal(
    run: Run,
    parent: Parent,
    stages: Sequence[DistillConfig],
    device: torch.device,
    reporter: Reporter,
    ranks: Ranks,
    weight_dtype: torch.dtype,
) -> list[HealResult]:
    """All stages, with a progress bar each."""
    texts = Texts(run, parent, reporter, ranks)
    packs = [texts.train(config) for config in stages]
    general = {config.general for config in stages if config.general is not None}
    others = {"general" if len(general) == 1 else source: texts.heldout(source) for source in sorted(general)}
    pair = Pair(run, parent, stages, device, ranks, weight_dtype)
    names = stage_names(stages) if len(stages) > 1 else [""]
    with reporter.bar("Healing", stages[0].steps) as (bar, task):

        def on_step(index: int, progress: Progress) -> None:
            note = f"loss {progress.loss:.3f}  {progress.tokens_per_s:,.0f} tokens/s" if progress.step else ""
            title = f"Healing {names[index]}".strip()
            bar.update(task, description=title, completed=progress.step, total=progress.total_steps, note=note)
            if (e := progress.evaluation) is not None:
                line = f"  {names[index]} step {progress.step}: held-out KL {e.kl:.4f}, perplexity {e.student_perplexity:.2f}"
                bar.console.print(line, highlight=False)

        return heal_in_stages(
            [Stage(config, pack) for config, pack in zip(stages, packs, strict=True)],
            pair.load,
            load_pack(run.path("data") / "heldout.npy"),
            run.path("distill"),
            other_texts=others,
            on_step=on_step,
        )


@dataclass
class Pair:
    """Loads teacher and student: whole on every rank, or real on rank 0 alone if they will be sharded.

    Attributes:
        weight_dtype: that the healed child will be written in.
    """

    run: Run
    parent: Parent
    stages: Sequence[DistillConfig]
    device: torch.device
    ranks: Ranks
    weight_dtype: torch.dtype
    _teacher: torch.nn.Module | None = None

    def load(self, config: DistillConfig) -> tuple[torch.nn.Module | None, torch.nn.Module]:
        """Fresh ones, but for a whole teacher, which healing does not change; none if the child will teach itself."""
        sharded = self.ranks.count > 1 and any(config.sharding == "full" for config in self.stages)
        place = ("cpu" if self.ranks.main else "meta") if sharded else self.device
        path = self.run.path("child")
        student = empty_child(path) if place == "meta" else load_child(path, rounded=False)
        if config.qad:
            round_model(student, through=self.weight_dtype)
        if config.teacher == "healed":
            self._teacher = None
        elif self._teacher is None or sharded:
            half = self.parent.dtype in (torch.bfloat16, torch.float16)
            exact = all(config.compute_dtype == "bfloat16" for config in self.stages)  # rounded in every product anyway
            dtype = self.parent.dtype if half and exact else torch.float32
            self._teacher = load_parent_model(self.parent, place, dtype)
        return self._teacher, student


def empty_child(path: Path) -> torch.nn.Module:
    """A child on the meta device, without weights."""
    from blocks.child.modeling_decilm import DeciLMForCausalLM

    config = DeciLMForCausalLM.config_class.from_pretrained(path)
    with torch.device("meta"):
        return DeciLMForCausalLM(config)


@dataclass(frozen=True)
class Texts:
    """Token packs of texts that are not the run's own, made once: texts/KEY/{train,heldout}.npy, split as `nas score` splits."""

    run: Run
    parent: Parent
    reporter: Reporter
    ranks: Ranks

    def train(self, config: DistillConfig) -> np.ndarray:
        """What a stage learns from."""
        if config.data is None:
            return load_pack(self.run.path("data") / "train.npy")
        return self._prepare(replace(self.run.config.data, source=config.data, train_tokens=config.tokens), "train")

    def heldout(self, source: str) -> np.ndarray:
        """What of a source no stage learns from."""
        return self._prepare(replace(self.run.config.data, source=source), "heldout")

    def _prepare(self, config: DataConfig, part: str) -> np.ndarray:
        directory = self.run.path("texts") / digest(to_dict(config))
        if self.ranks.main:
            with self.reporter.task(f"Reading {config.source}", 1) as advance:
                prepare_data(config, self.parent.tokenizer(), self.parent.shape.vocab_size, directory)
                advance()
        self.ranks.wait()
        return load_pack(directory / f"{part}.npy")


def _rows(found: dict[str, Any], healed: dict[str, Any], master: dict[str, Any]) -> list[dict[str, Any]]:
    """The table: parent, uniform baseline, child before and after healing; all on the same held-out text.

    A child with precisions stands there as it is served, and then as the master weights that it is rounded from.
    """
    heldout = found["heldout"]
    rows = [_row("parent", found["parent_cost"], {"kl": 0.0, "top1_agreement": 1.0, **heldout["parent"]})]
    if found["uniform_cost"] is not None:
        rows.append(_row("uniform baseline", found["uniform_cost"], heldout["uniform"]))
    names = {"child": "child before healing", "healed": "child after healing"}
    rows.append(_row(names["child"], found["cost"], heldout["child"]))
    rows.append(_row(names["healed"], found["cost"], healed["healed"]))
    for name, words in names.items():
        if (key := UNROUNDED.format(name)) in healed:
            rows.append(_row(UNROUNDED.format(words), master, healed[key]))
    return rows


def _master_cost(found: dict[str, Any], parent: Parent, architecture: Architecture) -> dict[str, Any]:
    """What the child would cost as its master weights: as much more as these take."""
    model = CostModel(parent.shape, Scenario(weight_dtype=found["scenario"]["weight_dtype"]))
    more = model.cost(architecture.structure).weight_bytes - model.cost(architecture).weight_bytes
    return {**found["cost"], "gb": found["cost"]["gb"] + more / 1e9}


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
