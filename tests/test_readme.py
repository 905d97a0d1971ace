"""What the README and CONTRIBUTING promise exists: commands, links, snippets, names, pins."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from entkd import __version__
from entkd.cli.commands import STAGES
from entkd.config import DIVERGENCE_NAMES, Experiment
from entkd.methods import APPROACHES

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


def test_the_method_names_everything_that_can_be_set() -> None:
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    lacking = [name for name in (*DIVERGENCE_NAMES, *APPROACHES) if f"| `{name}` |" not in text]
    assert lacking == [], "give each a row in docs/method.md"


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
