"""What the rules for tiny models don't know of single model types."""

from __future__ import annotations

from typing import Any

OVERRIDES: dict[str, dict[str, Any]] = {}
"""Fields of a configuration, by model type: `default` for those it's first made with."""
SINGLE: frozenset[str] = frozenset()
"""Model types that compute in float32 whatever their weights are."""
