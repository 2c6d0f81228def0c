"""The format of a dialogue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Message = Mapping[str, Any]
"""A turn of a dialogue, as `transformers`' chat templates take it: its `role`, and as `content` a
text, or a list of `{"type": "image", "image": path or Pillow image}` and `{"type": "text", "text":
...}`; of what is read here, a list always."""
