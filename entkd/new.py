"""`entkd new method NAME`: the files that a new approach starts from, in a checkout of the project."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from pathlib import Path

from entkd.config import DIVERGENCE_NAMES
from entkd.errors import UserError
from entkd.files import replacing
from entkd.methods import APPROACHES

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("method",)

METHOD = '''"""{title}: what it does, in one line (arXiv 0000.00000).

    w_i = 1 + strength · H_i

State the formula as the paper has it, with equation numbers, and where the released code differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from entkd.methods.base import Approach, Factors, Tokens

if TYPE_CHECKING:
    from torch import Tensor


class {title}(Approach):
    """What it does, in one line (arXiv 0000.00000)."""

    citation: ClassVar[str] = "Authors, year, arXiv 0000.00000"

    name: Literal["{name}"] = "{name}"
    """Which approach."""
    strength: float = Field(0.5, ge=0, le=1)
    """What it means, and what its ends are."""
    version: Literal[1] = 1
    """Version of the formula."""

    @property
    def statistics(self) -> tuple[str, ...]:
        # What `factors` reads: names in entkd.closeness.STATISTICS.
        return ("entropy",)

    def factors(self, tokens: Tokens, state: dict[str, Tensor]) -> Factors:
        entropy_N = tokens.statistics["entropy"]
        return Factors(weight_N=1 + self.strength * entropy_N)
'''

TEST = '''"""{title} by hand. Its loss and gradient are held against a second implementation in `methods.cases`."""

from __future__ import annotations

import pytest
import torch

from entkd.config import Method
from entkd.methods.base import Tokens
from entkd.methods.{name} import {title}


def weights(entropies: list[float], **settings: object) -> list[float]:
    tokens = Tokens(
        {{"entropy": torch.tensor(entropies, dtype=torch.float64)}},
        document_N=torch.zeros(len(entropies), dtype=torch.long),
        positions=len(entropies),
        selected=len(entropies),
        vocab_size=100,
    )
    return {title}.model_validate(settings).factors(tokens, {{}}).weight_N.tolist()


def test_it_can_be_used_by_its_name() -> None:
    method = Method.model_validate({{"divergence": "forward_kl", "approach": "{name}"}})
    assert isinstance(method.approach, {title})


def test_the_formula() -> None:
    assert weights([0.5, 2.0], strength=0.5) == pytest.approx([1.25, 2.0])  # 1 + 0.5 · 0.5 and 1 + 0.5 · 2


def test_without_strength_it_is_plain_distillation() -> None:
    assert weights([0.5, 2.0], strength=0.0) == [1.0, 1.0]
'''

NEXT = """Both run as they are. What is left, and what the tests ask for:
1. the formula in the first file, numbers by hand in the second;
2. its loss, written in another way, in tests/references/methods.py, and a line in tests/methods/cases.py;
3. its row in docs/method.md, and `entkd config-docs --output config`;
4. its arm in config/experiments/baselines.yaml, and `make evidence`.
CONTRIBUTING.md shows the whole diff of a method that is there."""


def new(kind: str, name: str, root: Path = ROOT) -> list[Path]:
    """Write the files and return them.

    Raises
    ------
    UserError
        If the name is no name of a module, or is taken, or there is no checkout to write into.
    """
    if kind not in KINDS:
        raise UserError(f"new {kind}: allowed are {', '.join(KINDS)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(f"new {kind} {name}: use a name of lower-case letters, digits and _, such as my_method")
    title = "".join(part.capitalize() for part in name.split("_"))
    if title in _names_in_use() or name in DIVERGENCE_NAMES:
        raise UserError(f"new {kind} {name}: `{title}` or `{name}` is something else already; choose another name")
    files = {root / f"entkd/methods/{name}.py": METHOD, root / f"tests/methods/test_{name}.py": TEST}
    taken = [path for path in files if path.exists()]
    if name in APPROACHES or taken:
        raise UserError(f"new {kind} {name}: is there already ({taken[0] if taken else name}); choose another name")
    if not (root / "tests").is_dir():
        raise UserError(f"new {kind} {name}: {root} is no checkout of the project; clone it and install it with -e")
    for path, text in files.items():
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text.format(title=title, name=name), encoding="utf-8")
    return list(files)


def _names_in_use() -> set[str]:
    """What the class must not be called: words of the language, its built-ins, and names in the written files."""
    texts = [template.format(title="Title", name="name") for template in (METHOD, TEST)]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    own = {node.id for node in nodes if isinstance(node, ast.Name)}
    own |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return {*keyword.kwlist, *dir(builtins), *own}
