"""What readers of the effects must know of the design: two bases, a half fraction."""

from __future__ import annotations

from entkd.stats import Factorial


def effect_words(design: Factorial, effect: str) -> str:
    """`a × b` for an interaction, `full − kd` for the difference of two arms, `a × b = −c × d` for an aliased pair."""
    if design.ends and effect == design.full_minus_base:
        return " − ".join(design.ends)
    return effect.replace(":", " × ").replace(" = -", " = −")


def design_notes(design: Factorial) -> tuple[str, ...]:
    """Footnotes of the effects: nothing for a complete design on one base."""
    notes = []
    if design.bases:
        off, on = design.bases
        notes.append(
            f"{design.factors[-1]} is the base as a factor: on where the components stand on {on}, off where they "
            f"stand on {off}. Main effects of components are means over both bases; that of the base is exploratory."
        )
    if design.bases and design.ends:
        full, base = design.ends
        notes.append(
            f"{full} − {base} is on {off}. Whether a component helps on both bases is its interaction with "
            f"{design.factors[-1]}: main effect + interaction is its effect on {on}, main effect − interaction its "
            f"effect on {off}."
        )
    if design.sign:
        sign, pair = ("−", "difference") if design.sign < 0 else ("", "sum")
        n = len(design.arms)
        notes.append(
            f"Half fraction: {n} of {2 * n} arms, defining relation I = {sign}{' × '.join(design.factors)}, resolution "
            f"IV. a × b = {sign}c × d is one estimate, of the {pair} of two interactions that these arms cannot tell "
            "apart. A main effect is clear of them; what it cannot be told from is the interaction of the other three "
            "factors, which is taken for 0. No base has both the arm with all components and the arm with none, so "
            "the declared effects are main effects alone."
        )
    return tuple(notes)
