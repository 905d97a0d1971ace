"""What the table says of the teacher's passes: which runs share one, and which made it run again."""

from __future__ import annotations

import pandas as pd


def ledger(runs: pd.DataFrame | None) -> tuple[str, ...]:
    """What the teacher read, and for how many runs; and in which it ran again."""
    if runs is None or "teacher_tokens" not in runs:
        return ()
    return (*_once(runs), *_again(runs))


def _once(runs: pd.DataFrame) -> tuple[str, ...]:
    """A line for each stored pass; with the arms that read it where there are several, as of another teacher."""
    readers = runs[runs["teacher_tokens"] > 0]
    # Runs from before they named their signals are told apart by the length of the pass alone.
    key = [column for column in ("teacher_tokens", "signals") if column in readers]
    passes = [(int(rows["teacher_tokens"].iloc[0]), rows) for _, rows in readers.groupby(key, dropna=False)]
    return tuple(
        f"The teacher read {tokens:,} tokens, once: {len(rows)} of the {len(runs)} runs trained on that one pass, in "
        "every epoch" + (f" ({', '.join(rows['arm'].unique())})." if len(passes) > 1 else ".")
        for tokens, rows in passes
    )


def _again(runs: pd.DataFrame) -> tuple[str, ...]:
    """Arms whose students write text, which the teacher reads in training: a cost that others do not have."""
    if "teacher_tokens_online" not in runs:
        return ()
    online = runs[runs["teacher_tokens_online"] > 0]
    lines = []
    for arm, rows in online.groupby("arm", sort=False):
        read, wrote = (rows[column].mean() for column in ("teacher_tokens_online", "generated_tokens"))
        line = f"The teacher ran again for {arm}: on average it read {read:,.0f} tokens a run, in text of which the "
        line += f"student wrote {wrote:,.0f}"
        if "on_policy_steps" in rows:
            steps = [rows[column].mean() for column in ("on_policy_steps", "steps", "replayed_steps")]
            line += "; {:.3g} of its {:.3g} steps were on such text, {:.3g} of these out of its buffer".format(*steps)
        lines.append(f"{line}.")
    return tuple(lines)
