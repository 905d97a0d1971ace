"""What the table says of the teacher's passes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from fake_results import fake_results
from test_tables import settings_of, tables


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results, to change and write again."""
    fake_results(tmp_path, n_items=6)
    return tmp_path


def test_the_table_says_what_the_teacher_read_and_for_how_many_runs(folder: Path) -> None:
    runs = pd.read_csv(folder / "runs.csv")
    runs.loc[runs["arm"] == "sft", "teacher_tokens"] = 0
    runs.to_csv(folder / "runs.csv", index=False)
    tables(folder, settings_of("kl"))
    readers = int((runs["arm"] != "sft").sum())
    assert (
        f"The teacher read 12,000 tokens, once: {readers} of the {len(runs)} runs trained on that one pass"
        in (folder / "out/ablation_table.md").read_text()
    )
    assert (folder / "out/ablation_table.md").read_text().count("The teacher read") == 1  # not for runs without it


def test_the_table_says_in_which_arms_the_teacher_ran_again(folder: Path) -> None:
    runs = pd.read_csv(folder / "runs.csv").assign(teacher_tokens_online=0, generated_tokens=0)
    mine = runs["arm"] == "sft"
    runs.loc[mine, "teacher_tokens_online"] = [30_000 + 3_000 * n for n in range(mine.sum())]
    runs.loc[mine, "generated_tokens"] = [20_000 + 3_000 * n for n in range(mine.sum())]
    runs.to_csv(folder / "runs.csv", index=False)
    tables(folder, settings_of("kl"))
    shown = (folder / "out/ablation_table.md").read_text()
    middle = 1_500 * (mine.sum() - 1)
    assert (
        f"The teacher ran again for sft: on average it read {30_000 + middle:,} tokens a run, in text of which the "
        f"student wrote {20_000 + middle:,}." in shown
    )
    assert shown.count("ran again") == 1  # not for arms that train on the data
    runs.assign(on_policy_steps=24, replayed_steps=[n % 3 for n in range(len(runs))]).to_csv(
        folder / "runs.csv", index=False
    )
    tables(folder, settings_of("kl"))
    shown = (folder / "out/ablation_table.md").read_text()
    assert f"wrote {20_000 + middle:,}; 24 of its 48 steps were on such text, 1 of these out of its buffer." in shown


def test_passes_of_one_length_are_told_apart_by_their_signals(folder: Path) -> None:
    """A teacher's assistant has read the same tokens, and is another one."""
    runs = pd.read_csv(folder / "runs.csv")
    assistant = runs["arm"].isin(["sft", "seqkd"])
    runs["signals"] = assistant.map({True: "b" * 12, False: "a" * 12})
    runs.to_csv(folder / "runs.csv", index=False)
    tables(folder, settings_of("kl"))
    notes = [line for line in (folder / "out/ablation_table.md").read_text().splitlines() if "The teacher read" in line]
    assert len(notes) == 2
    assert notes[1].endswith(
        f"once: {assistant.sum()} of the {len(runs)} runs trained on that one pass, in every epoch (sft, seqkd)."
    )
    assert "kd, curriculum" in notes[0]
