"""Names that configuration, scoring, tables and figures share. Imports nothing."""

COMPONENTS = ("curriculum", "temperature", "features")
"""The components of the method; what can be a factor of the factorial, each off or on."""
FIDELITY = "entkd_fidelity"
"""Task under which scoring reports the distance to the teacher."""
GAP_CLOSED = "gap_closed"
"""Task of the table's rows that sum over a suite; `suite/gap_closed` where there are several suites."""
SLUG = r"^[a-z0-9][a-z0-9_.=-]*$"
"""Names that become folders."""
