"""Published methods beyond a divergence: a module each, with its settings, its formula and its source."""

import entkd.config  # noqa: F401  # whose settings name the classes here: imported first, a module here would be half-made
