"""Results of an experiment that never ran, in the formats of the real stages: 12 arms × 3 seeds × 5 tasks.

Values are drawn from a crossed model (arm effect + seed effect + item effect + residual), so that the analysis has
something to find: KL falls with each component, ROUGE-L and the minimal pairs hardly move.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SEEDS = (0, 1, 2)
COMPONENTS = {"curriculum": "soft κ=0.8", "temperature": "c=0.5", "features": "cosine θ=0.8"}
FACTORIAL = {
    "kd": (),
    "curriculum": ("curriculum",),
    "temperature": ("temperature",),
    "features": ("features",),
    "curriculum_temperature": ("curriculum", "temperature"),
    "curriculum_features": ("curriculum", "features"),
    "temperature_features": ("temperature", "features"),
    "full": ("curriculum", "temperature", "features"),
}
# task: (metric, direction, untrained, teacher, share of the gap that kd closes, sd of items, sd over seeds, min_gap)
TASKS: dict[str, tuple[str, str, float, float, float, float, float, float]] = {
    "entkd_heldout": ("bits_per_byte", "lower", 3.1, 0.9, 0.55, 0.25, 0.01, 0.05),
    "entkd_rouge": ("rougeL", "higher", 0.04, 0.42, 0.40, 0.10, 0.01, 0.02),
    "entkd_minimal_pairs": ("acc", "higher", 0.52, 0.81, 0.45, 0.0, 0.02, 0.02),
    "entkd_fidelity": ("kl", "lower", 5.0, 0.0, 0.60, 0.30, 0.02, 0.0),
    "entkd_fidelity/top1": ("top1_agreement", "higher", 0.10, 1.0, 0.55, 0.08, 0.01, 0.0),
}


def fake_settings() -> dict[str, Any]:
    """Settings as the table and figure stages get them."""
    arms = [{"name": name, "role": "baseline", "divergence": ""} for name in ("sft", "seqkd")]
    arms += [{"name": name, "role": "factorial", "divergence": "forward_kl"} for name in FACTORIAL]
    reverse = ("reverse_kl", "reverse_kl_full")
    arms += [{"name": name, "role": "baseline", "divergence": "reverse_kl"} for name in reverse]
    for arm in arms:
        on = FACTORIAL["full"] if arm["name"] == "reverse_kl_full" else FACTORIAL.get(arm["name"], ())
        arm |= {component: label if component in on else "" for component, label in COMPONENTS.items()}
    tasks = [
        {
            "suite": "demo",
            "task": task.split("/")[0],
            "metric": metric,
            "direction": direction,
            "min_gap": min_gap,
            "scale": 1.0,
        }
        for task, (metric, direction, *_, min_gap) in TASKS.items()
    ]
    return {
        "analysis": {"reference": "kd", "alpha": 0.05, "power": 0.8},
        "arms": arms,
        "tasks": tasks,
        "primary": ["curriculum", "temperature", "features", "full-kd"],
    }


def _share(arm: str) -> float:
    """How much of kd's share of the gap an arm closes."""
    if arm in ("untrained", "teacher"):
        return {"untrained": 0.0, "teacher": 1.0}[arm]
    if arm in FACTORIAL:
        return 1 + 0.04 * ("curriculum" in FACTORIAL[arm]) + 0.12 * ("features" in FACTORIAL[arm])
    return {"sft": 0.85, "seqkd": 0.8, "reverse_kl": 0.97, "reverse_kl_full": 1.1}[arm]


def fake_items(n_items: int = 50, seeds: tuple[int, ...] = SEEDS) -> pd.DataFrame:
    """Scores per item: arm, seed, suite, task, metric, item, value."""
    names = ["teacher", "untrained", *(arm["name"] for arm in fake_settings()["arms"])]
    frames = []
    for key, (metric, direction, untrained, teacher, kd_share, item_sd, seed_sd, _) in TASKS.items():
        item_effect = np.random.default_rng(zlib.crc32(key.encode())).normal(0, item_sd, n_items)
        for arm in names:
            reference = arm in ("teacher", "untrained")
            share = _share(arm) if reference else min(1.0, kd_share * _share(arm))
            level = untrained + share * (teacher - untrained)
            for seed in (0,) if reference else seeds:
                rng = np.random.default_rng(zlib.crc32(f"{key} {arm} {seed}".encode()))
                value = level + (0 if reference else rng.normal(0, seed_sd)) + item_effect
                value = value + rng.normal(0, item_sd / 3, n_items)
                if arm == "teacher" and key.startswith("entkd_fidelity"):
                    value = np.full(n_items, teacher)
                elif metric == "acc":
                    value = (rng.random(n_items) < value).astype(float)
                elif direction == "higher":
                    value = np.clip(value, 0, 1)
                else:
                    value = np.maximum(value, 0)
                columns = {"arm": arm, "seed": seed, "suite": "demo", "task": key.split("/")[0], "metric": metric}
                frames.append(pd.DataFrame(columns | {"item": np.arange(n_items), "value": value}))
    return pd.concat(frames, ignore_index=True)


def fake_scores(items: pd.DataFrame) -> pd.DataFrame:
    """What the items average to, and the KL by decile of teacher entropy."""
    groups = items.groupby(["arm", "seed", "suite", "task", "metric"], sort=False)["value"]
    scores = groups.agg(["mean", "sem", "count"]).reset_index()
    scores = scores.rename(columns={"mean": "value", "sem": "stderr", "count": "n"}).assign(task_version="1.0")
    kl = scores[scores["metric"] == "kl"]
    factor = {f"kl_decile_{k:02d}": 0.3 + 0.14 * k for k in range(1, 11)}
    deciles = [kl.assign(metric=metric, value=kl["value"] * f, stderr=np.nan) for metric, f in factor.items()]
    return pd.concat([scores, *deciles], ignore_index=True)


def fake_runs(seeds: tuple[int, ...] = SEEDS) -> pd.DataFrame:
    """What each student cost."""
    rows = []
    for position, arm in enumerate(arm["name"] for arm in fake_settings()["arms"]):
        for seed in seeds:
            more = 1.05 if "features" in FACTORIAL.get(arm, ()) else 1.0
            cost = {"seconds": (40.0 + position + seed) * more, "tflops": 12.5 * more, "peak_gib": 1.2 * more}
            size = {"steps": 48, "tokens": 24576, "positions": 9800 + 10 * seed}
            rest = {"teacher_tokens": 12000, "resumed": 0, "device": "cpu"}
            rows.append({"arm": arm, "seed": seed, **size, **cost, **rest})
    return pd.DataFrame(rows)


def fake_curves(seeds: tuple[int, ...] = SEEDS) -> pd.DataFrame:
    """Learning curves in long form."""
    rows = []
    for arm in (arm["name"] for arm in fake_settings()["arms"]):
        for seed in seeds:
            rng = np.random.default_rng(zlib.crc32(f"curve {arm} {seed}".encode()))
            for step in range(1, 49):
                decay = np.exp(-step * _share(arm) / 20)
                values = {"loss": 1.0 + 4 * decay + rng.normal(0, 0.1), "weight_scale_mean": 0.9 + 0.01 * step}
                values["progress"] = (step - 0.5) / 48
                if step % 8 == 0:
                    values["dev_nll"] = 2.0 + 5 * decay + rng.normal(0, 0.02)
                rows += [(arm, seed, step, 0.8 * step, metric, value) for metric, value in values.items()]
    return pd.DataFrame(rows, columns=["arm", "seed", "step", "seconds", "metric", "value"])


def fake_entropy() -> pd.DataFrame:
    """Histograms of teacher entropy (most of it near 0) and of difficulty (uniform)."""
    rng = np.random.default_rng(7)
    draws = {"entropy": (rng.exponential(1.2, 20000), np.linspace(0, 10.8, 61))}
    draws["difficulty"] = (rng.random(20000), np.linspace(0, 1, 41))
    frames = []
    for quantity, (values, edges) in draws.items():
        count, _ = np.histogram(values, edges)
        frames.append(pd.DataFrame({"quantity": quantity, "left": edges[:-1], "right": edges[1:], "count": count}))
    return pd.concat(frames, ignore_index=True)


def fake_results(folder: Path, n_items: int = 50, seeds: tuple[int, ...] = SEEDS) -> dict[str, Any]:
    """Write scores.csv, items.parquet, runs.csv, curves.csv and entropy.csv into ``folder``; return the settings."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    items = fake_items(n_items, seeds)
    items.to_parquet(folder / "items.parquet", index=False)
    fake_scores(items).to_csv(folder / "scores.csv", index=False)
    fake_runs(seeds).to_csv(folder / "runs.csv", index=False)
    fake_curves(seeds).to_csv(folder / "curves.csv", index=False)
    fake_entropy().to_csv(folder / "entropy.csv", index=False)
    return fake_settings()
