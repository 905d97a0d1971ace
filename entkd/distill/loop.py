"""The training loop: one student, one arm, one seed; read it from top to bottom.

Everything random is drawn from named streams, everything per token is addressed by the token's place in the data,
and every denominator is counted over the whole optimizer step before its first forward pass. So the result does
not depend on micro-batches, devices, logging or interruptions.
"""

from __future__ import annotations

import json
import math
import sys
import time
from datetime import UTC, datetime

import torch

from entkd import native, runtime
from entkd.checkpoint import ResumeFolder, StopRequest
from entkd.curriculum import progress_schedule
from entkd.data import Corpus
from entkd.data.packing import collate
from entkd.distill.approach import response_lengths
from entkd.distill.distributed import World
from entkd.distill.evaluate import dev_nll
from entkd.distill.metrics import Metrics
from entkd.distill.objective import Objective
from entkd.distill.optim import build_optimizer, clip_gradients, learning_rates, set_learning_rate
from entkd.distill.outputs import write_outputs
from entkd.distill.plan import Costs, plan_run
from entkd.distill.run import Run
from entkd.distill.scan import scans, with_factors
from entkd.distill.steps import step_source
from entkd.distill.targets import TeacherTargets
from entkd.distill.untrained import untrained_statistics
from entkd.errors import UserError
from entkd.models import load_model, load_tokenizer, prepare_for_cpu
from entkd.progress import Progress
from entkd.provenance import device_name, git_sha, peak_gib, versions


def diverged(run: Run, nll: float, step: int) -> bool:
    """Whether the dev loss is no number any more: the result of a trial, the end of any other run."""
    if math.isfinite(nll):
        return False
    says = f"{run.title}: the dev loss is {nll} at step {step}"
    if not run.trial:
        raise UserError(f"{says}; lower training.lr, set training.clip")
    print(says, file=sys.stderr, flush=True)
    return True


def train(run: Run, resume: ResumeFolder, world: World, device: torch.device) -> None:
    """Train from the state in ``resume``, or from the start, and write the outputs."""
    method, training, seed, output, dtype = run.method, run.training, run.seed, run.output, run.dtype
    started = datetime.now(UTC).isoformat(timespec="seconds")
    began = time.monotonic()
    manifest = json.loads((run.data / "manifest.json").read_text(encoding="utf-8"))
    vocab_size, pad_id = manifest["vocab_size"], manifest["eos_token_id"]

    # ── data, teacher, student ────────────────────────────────────────────────────────────────────────────────
    corpus, dev = Corpus.open(run.data, "train"), Corpus.open(run.data, "dev")
    targets = TeacherTargets(method, run.signals, run.data, corpus, seed)
    student = load_model(run.student).train()
    student.to(device)
    if device.type == "cpu" and world.size == 1:  # DDP adds up gradients before the rows are there
        prepare_for_cpu(student, dtype)
    objective = Objective(
        student,
        method,
        vocab_size,
        teacher_head_UE=targets.head_UE,
        teacher_width=targets.store.width if targets.store is not None else 0,
        generator=runtime.torch_stream(seed, "projectors"),
    ).to(device)
    projectors = objective.projectors
    module = world.wrap(objective)
    seconds_beforehand = 0.0
    if targets.store is not None and targets.waits_for_student:  # untrained: no resume state is loaded yet
        difficulty, store, start = method.difficulty.source, targets.store, time.monotonic()
        student_R = untrained_statistics(difficulty, student, corpus, store, training, pad_id, world, device, dtype)
        targets.use_student(student_R)
        seconds_beforehand = time.monotonic() - start

    # ── schedule: known as a whole before the first step ──────────────────────────────────────────────────────
    costs = Costs.of(student, corpus, targets, training, vocab_size)
    steps = plan_run(corpus, training, seed, costs)
    rates = learning_rates(training, len(steps))
    progress = progress_schedule(rates, method.curriculum.progress if method.curriculum is not None else "lr")
    optimizer = build_optimizer(
        student, projectors, training, method.features.projector_lr if method.features is not None else None
    )

    def evaluate() -> float:
        return dev_nll(student, dev, training, vocab_size, pad_id, device, dtype)

    source = step_source(run, steps, targets, corpus, student, pad_id, world, device, evaluate)

    # ── where an interrupted run stopped ──────────────────────────────────────────────────────────────────────
    torch.manual_seed(runtime.stream_seed(seed, f"dropout {world.rank}" if world.rank else "dropout"))
    metrics = Metrics()
    first, seconds_before, resumed, threads = 0, 0.0, 0, [torch.get_num_threads()]
    tokens = positions = hard = scanned = 0
    best_nll, best_step, nll = math.inf, 0, math.nan
    state = resume.load()
    if state is not None:
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        metrics.rows = json.loads(state["metrics"])
        first, seconds_before, resumed = state["step"], state["seconds"], state["resumed"] + 1
        best_nll, best_step = state["best_nll"], state["best_step"]
        tokens, positions, hard, scanned = (state[key] for key in ("tokens", "positions", "hard", "scanned"))
        source.load_state(state["source"])
        threads = sorted({*state["threads"], *threads})
        print(f"{output}: continuing after step {first} of {len(steps)}", file=sys.stderr, flush=True)
        del state

    def save(step: int) -> None:
        metrics.flush()
        resume.save(
            {
                "step": step,
                "objective": objective.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                "metrics": json.dumps(metrics.rows),
                "seconds": seconds_before + time.monotonic() - began,
                "resumed": resumed,
                "threads": threads,
                "best_nll": best_nll,
                "best_step": best_step,
                "tokens": tokens,
                "positions": positions,
                "hard": hard,
                "scanned": scanned,
                "source": source.state(),
            }
        )
        resume.prune_best(best_step)

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────────────────
    saved_at, done = time.monotonic(), first
    with StopRequest() as request, Progress(run.title, len(steps), "step", first, world.leads) as bar:
        for step, blocks in enumerate(steps, start=1):
            if step <= first:
                continue
            micros = [blocks[i : i + training.micro_blocks] for i in range(0, len(blocks), training.micro_blocks)]
            batches = [collate(corpus, micro, training.block, pad_id) for micro in micros]
            targets_of_step = source.step(step, blocks, batches, progress[step - 1])
            micro_batches, selected = targets_of_step.micro_batches, 0
            if method.approach is not None:
                selected = method.approach.selected(response_lengths([micro.batch for micro in micro_batches]))
                if scans(method, len(micro_batches)):
                    scanned += targets_of_step.tokens
                    micro_batches = with_factors(
                        objective, micro_batches, world, device, dtype, targets_of_step.positions, selected
                    )
            tokens, positions = tokens + targets_of_step.tokens, positions + targets_of_step.positions
            hard += targets_of_step.hard
            set_learning_rate(optimizer, rates[step - 1], training)
            optimizer.zero_grad(set_to_none=True)
            terms: dict[str, torch.Tensor] = {}
            for micro_batch in world.share(micro_batches):
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                    losses = module(
                        micro_batch.to(device), targets_of_step.positions, targets_of_step.hard, selected=selected
                    )
                # Each micro-batch carries the global denominators, so gradients simply add up; DDP averages over
                # the processes, which the factor undoes.
                (losses["loss"] * world.size).backward()
                for name, value in losses.items():
                    terms[name] = terms[name] + value.detach() if name in terms else value.detach()
            norm = clip_gradients(student, projectors, training.clip, optimizer)
            optimizer.step()
            done = step
            terms = world.sum(terms)
            of_approach = {}
            if objective.approach is not None:
                of_approach = objective.approach.logged()
                objective.approach.end_step(terms, step - 1, len(steps))
            metrics.add(
                {
                    "step": step,
                    "tokens": tokens,
                    "positions": positions,
                    "lr": rates[step - 1],
                    "progress": progress[step - 1],
                    **targets_of_step.summary,
                },
                terms | {"grad_norm": norm} | of_approach,
                seconds_before + time.monotonic() - began,
            )
            if step % training.eval_every == 0 or step == len(steps):
                nll = evaluate()
                metrics.flush()
                if diverged(run, nll, step):
                    break
                metrics.rows.append({"step": step, "dev_nll": nll})
                source.evaluated(nll)
                if training.checkpoint == "best" and nll < best_nll:
                    best_nll, best_step = nll, step
                    if world.leads and not run.trial:
                        resume.save_best(student, step)
            if step % run.log_every == 0 or step == len(steps):
                metrics.flush()
                bar.advance(1, **metrics.latest("loss", "dev_nll"))
            else:
                bar.advance()
            # Several processes agree by a collective, which costs a sync: they ask each other less often.
            if step == len(steps) or (world.size > 1 and step % run.log_every):
                continue
            due = time.monotonic() - saved_at > 60 * run.save_minutes
            if world.any(due or request.save):
                if world.leads:
                    save(step)
                world.barrier()
                saved_at, request.save = time.monotonic(), False
                if world.any(request.stop):
                    sys.exit(143)  # 128 + SIGTERM: the job did not finish, its state is kept

    # ── outputs, last ─────────────────────────────────────────────────────────────────────────────────────────
    runtime.synchronize(device)
    if world.leads:
        metrics.flush()
        seconds = seconds_before + time.monotonic() - began
        if training.checkpoint == "best" and not run.trial:
            resume.load_best(student, best_step)
        if math.isfinite(nll) and training.checkpoint == "best":
            nll = best_nll
        record = {
            "arm": run.settings,
            "identity": resume.identity,
            "seed": seed,
            "git_sha": git_sha(),
            "versions": versions(),
            "device": device_name(device),
            "processes": world.size,
            "threads": threads,
            "precision": str(dtype).removeprefix("torch."),
            # Other kernels round their sums in another order: the last bits of a run depend on them.
            "compiled_kernels": device.type == "cpu" and native.available(),
            "steps": done,
            "best_step": best_step or done,
            "dev_nll": nll if math.isfinite(nll) else None,
            "tokens": tokens,
            "positions": positions,
            "seconds": round(seconds, 3),
            "seconds_beforehand": round(seconds_beforehand, 3),
            "peak_gib": round(peak_gib(device), 3),
            "tflops": costs.beforehand + costs.of_tokens(tokens, positions, hard, scanned) + source.tflops(),
            "signals": targets.store.manifest["key"][:12] if targets.store is not None else "",
            "teacher_tokens": targets.store.manifest["summary"]["teacher_tokens"] if targets.store is not None else 0,
            **source.record(),
            "resumed": resumed,
            "started": started,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        kept = None if run.trial else (student, load_tokenizer(run.student))
        write_outputs(output, kept, training.save_dtype, metrics.rows, record)
