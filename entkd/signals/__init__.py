"""The teacher signal store: what the teacher says of every response token, computed once for all arms and seeds."""

from entkd.signals.split import SplitSignals
from entkd.signals.store import SignalStore

__all__ = ["SignalStore", "SplitSignals"]
