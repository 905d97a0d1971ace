"""What the README and CONTRIBUTING promise exists: commands, links, snippets, diffs that still apply, pins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from entkd import __version__
from entkd.cli.commands import STAGES
from entkd.config import Experiment

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/method.md", "docs/evidence.md", "results/README.md"]
FENCE = re.compile(r"^[ ]*```(\w+)\n(.*?)^[ ]*```", re.M | re.S)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [body for name, body in FENCE.findall(text) if name == language]


def commands(page: str) -> list[list[str]]:
    """The words of every command line of a page, comments left out."""
    lines = "\n".join(blocks(page, "bash")).splitlines()
    return [words for line in lines if (words := line.split("#")[0].split())]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_commands_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = commands(page)
    assert found
    for words in found:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), words
        if words[0] == "entkd":
            assert words[1] in STAGES, words
        for word in words:
            experiment = re.fullmatch(r"EXPERIMENT=(\w+)", word)
            if experiment and experiment[1] != "mine":  # the reader's own, copied in the line before
                assert (ROOT / f"config/experiments/{experiment[1]}.yaml").is_file(), words
            if word.startswith("profiles/"):
                assert (ROOT / word / "profile.yaml").is_file(), words


def test_stages_named_in_prose_exist() -> None:
    for page in PAGES:
        for stage in re.findall(r"`entkd ([a-z-]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert stage in STAGES, (page, stage)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_yaml_snippets_are_arms_of_the_demo() -> None:
    demo = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
    snippets = [yaml.safe_load(body) for body in blocks("README.md", "yaml")]
    lines = re.findall(r"^\+  (\w+: \{.*\})$", "\n".join(blocks("CONTRIBUTING.md", "diff")), re.M)
    snippets += [{"arms": yaml.safe_load(line)} for line in lines]
    assert len([snippet for snippet in snippets if "arms" in snippet]) == 3
    for snippet in snippets:
        arms = demo["arms"] | snippet.get("arms", {})
        Experiment.model_validate(demo | {"arms": arms, "tune": snippet.get("tune")})


def test_diffs_of_the_recipes_apply(tmp_path: Path) -> None:
    """`git apply` takes each as it stands in the guide, and what it makes are whole Python and YAML files."""
    diffs = blocks("CONTRIBUTING.md", "diff")
    assert len(diffs) == 5
    for number, diff in enumerate(diffs):
        folder = tmp_path / str(number)
        paths = re.findall(r"^\+\+\+ b/(\S+)$", diff, re.M)
        for old, path in zip(re.findall(r"^--- (\S+)$", diff, re.M), paths, strict=True):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if old != "/dev/null":
                assert old == f"a/{path}"
                shutil.copy(ROOT / path, folder / path)
            assert (old == "/dev/null") == (not (ROOT / path).exists()), path
        outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}  # so that no repository changes the paths
        for check in (["--check"], []):
            command = ["git", "apply", *check, "-"]
            applied = subprocess.run(command, cwd=folder, env=outside, input=diff, text=True, capture_output=True)
            assert applied.returncode == 0, applied.stderr
        for path in paths:
            text = (folder / path).read_text(encoding="utf-8")
            if path.endswith(".py"):
                compile(text, path, "exec")
            if path.endswith(".yaml"):
                Experiment.model_validate(yaml.safe_load(text))


def test_a_pipeline_is_at_most_25_lines() -> None:
    diff = next(body for body in blocks("CONTRIBUTING.md", "diff") if "warm_start.smk" in body)
    rules = diff.split("--- a/workflow/Snakefile")[0]
    assert 5 < len(re.findall(r"^\+(?!\+)", rules, re.M)) <= 25


def test_every_dependency_is_pinned_once_and_allowed() -> None:
    pins = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if line[0] != "#"]
    names = [canonicalize_name(pin.name) for pin in pins]
    assert names == sorted(set(names))
    version = dict(zip(names, (str(pin.specifier).removeprefix("==") for pin in pins), strict=True))
    assert all(re.fullmatch(r"[\w.]+", number) for number in version.values())
    assert version["torch"] == "2.13.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    needed += [name for extra in ("test", "dev") for name in project["project"]["optional-dependencies"][extra]]
    for requirement in map(Requirement, needed):
        if requirement.name != "entkd":
            assert version[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_one_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
