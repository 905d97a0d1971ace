"""Tokens per second of ``entkd.generate`` against ``model.generate`` of transformers, on the same prompts.

Run from the repository root::

    python -m benchmarks.generate

Both systems take turns, and the table holds medians. Before any clock runs, their greedy continuations in fp32 must
be the same, token by token. Transformers gets the prompts sorted by length in batches of the same size, and samples
from the same distribution; a continuation counts up to its EOS.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.inputs import prepare_inputs
from entkd.data.corpus import Corpus
from entkd.generate import generate
from entkd.models import load_model, load_tokenizer
from entkd.runtime import resolve_dtype, synchronize

Generate = Callable[[float, float], list[list[int]]]
"""Continuations of all prompts for a temperature and a top_p."""

SETTINGS = {
    "greedy": ("own", 0.0, 1.0),
    "sampled": ("own", 1.0, 1.0),
    "sampled, one prompt": ("same", 1.0, 0.95),
}
"""Prompts, temperature, top_p. The last is how requests for synthetic data are written: from one prompt, with top_p."""


def own(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], new_tokens: int, batch: int
) -> Generate:
    """`entkd.generate`."""
    stream = torch.Generator().manual_seed(0)
    longest = max(map(len, prompts)) + new_tokens

    def run(temperature: float, top_p: float) -> list[list[int]]:
        limits = {"max_new_tokens": new_tokens, "max_length": longest}
        draws = {"temperature": temperature, "top_p": top_p, "generator": stream}
        return generate(model, tokenizer, prompts, batch=batch, **limits, **draws)

    return run


def transformers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], new_tokens: int, batch: int
) -> Generate:
    """`model.generate` of transformers."""
    eos = tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)

    def run(temperature: float, top_p: float) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in prompts]
        draws = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            width = max(len(prompts[row]) for row in rows)
            ids = torch.tensor([[eos] * (width - len(prompts[row])) + prompts[row] for row in rows])
            mask = torch.tensor([[0] * (width - len(prompts[row])) + [1] * len(prompts[row]) for row in rows])
            written = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=new_tokens,
                eos_token_id=eos,
                pad_token_id=eos,
                **({"do_sample": False} | draws),
            )
            for row, tokens in zip(rows, written[:, width:].tolist(), strict=True):
                outputs[row] = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        return outputs

    return run


def compare(systems: dict[str, Generate], temperature: float, top_p: float, repeats: int) -> dict[str, float]:
    """Median tokens per second of each system; they take turns."""
    rates: dict[str, list[float]] = {name: [] for name in systems}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for _ in range(repeats):
        for name, system in systems.items():
            synchronize(device)
            start = time.perf_counter()
            tokens = sum(map(len, system(temperature, top_p)))
            synchronize(device)
            rates[name].append(tokens / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def read_prompts(data: Path, wanted: int) -> list[list[int]]:
    """Prompts of the training split, from the first on."""
    corpus = Corpus.open(data, "train")
    documents = (corpus.document(index) for index in range(min(wanted, len(corpus))))
    return [ids[:prompt_length].tolist() for ids, prompt_length in documents]


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="model folder; the bundled teacher where left out")
    parser.add_argument("--data", type=Path, help="data folder of its tokenizer; the demo's where left out")
    parser.add_argument("--precision", default="auto", help="auto, bf16 or fp32 of the timed runs")
    parser.add_argument("--prompts", type=int, default=48, help="at most so many prompts")
    parser.add_argument("--batch", type=int, default=48, help="rows continued together")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest continuation")
    parser.add_argument("--repeats", type=int, default=5, help="runs behind each median")
    parser.add_argument("--output", type=Path, default=Path("results/bench/generate.csv"))
    options = parser.parse_args(arguments)
    if options.teacher is None or options.data is None:
        inputs = prepare_inputs(Path("results"), Path("cache/bench"), None, 64)
        options.teacher, options.data = options.teacher or inputs.teacher, options.data or inputs.data

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(options.teacher)
    prompts = read_prompts(options.data, options.prompts)
    kinds = {"own": prompts, "same": [prompts[0]] * len(prompts)}
    makers = {"entkd": own, "transformers": transformers}

    model = load_model(options.teacher, dtype=torch.float32).to(device)
    few = prompts[:8]
    expected, found = (make(model, tokenizer, few, 32, 8)(0.0, 1.0) for make in (transformers, own))
    if expected != found:
        raise SystemExit("greedy continuations in fp32 differ from those of transformers")
    print(f"greedy continuations in fp32 are equal: {sum(map(len, found))} tokens")

    model = load_model(options.teacher, dtype=resolve_dtype(options.precision, device)).to(device)
    rows: list[dict[str, object]] = []
    for setting, (kind, temperature, top_p) in SETTINGS.items():
        systems = {
            name: make(model, tokenizer, kinds[kind], options.new_tokens, options.batch)
            for name, make in makers.items()
        }
        rates = compare(systems, temperature, top_p, options.repeats)
        row: dict[str, object] = {
            "setting": setting,
            "precision": str(model.dtype).removeprefix("torch."),
            "device": device.type,
            "threads": torch.get_num_threads(),
            "prompts": len(prompts),
            "batch": options.batch,
            "new_tokens": options.new_tokens,
            "repeats": options.repeats,
        }
        row |= {f"{name}_tokens_per_s": round(rate, 1) for name, rate in rates.items()}
        row["ratio"] = round(rates["entkd"] / rates["transformers"], 2)
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


if __name__ == "__main__":
    main()
