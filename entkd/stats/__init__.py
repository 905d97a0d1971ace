"""How scores become claims. Imports numpy and scipy alone.

Everything is a difference in natural units (arm minus reference, on minus off) between runs of the same seed and the
same benchmark items. ``paired`` compares two arms, ``factorial`` analyses the factorial of the components,
``families`` corrects for the number of tests and words the claim, ``power`` says what one test could have detected and
``joint`` what the two tests of a pair of arms could, ``gap`` is the descriptive share of the teacher's lead.
"""

from entkd.design import Factorial, factorial_of
from entkd.stats.factorial import Effect, factorial_effects
from entkd.stats.families import claim, holm
from entkd.stats.gap import fieller
from entkd.stats.joint import jointly_detectable
from entkd.stats.paired import LEVEL, Difference, compare
from entkd.stats.power import power, seeds_needed, smallest_detectable

__all__ = [
    "LEVEL",
    "Difference",
    "Effect",
    "Factorial",
    "claim",
    "compare",
    "factorial_effects",
    "factorial_of",
    "fieller",
    "holm",
    "jointly_detectable",
    "power",
    "seeds_needed",
    "smallest_detectable",
]
