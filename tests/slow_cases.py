"""Parameters of tests that are left to `-m slow`."""

from __future__ import annotations

import pytest

from rayltx.diffusion_models.lightricks.tiny_configs import TRANSFORMER_CONFIGS


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# Of the embedded host's models, those first whose forwards have most of what the others' have.
_IN_SHORT = ("LTX-Video", "LTX-2.3")
EMBEDDED_VERSIONS = [*_IN_SHORT, *slow(*(version for version in TRANSFORMER_CONFIGS if version not in _IN_SHORT))]
