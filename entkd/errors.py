"""The one exception for a user's mistake."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: the message names the key or path, the value and the fix; no traceback is shown."""
