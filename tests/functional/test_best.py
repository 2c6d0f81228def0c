"""The greatest of each row, as torch finds it."""

from __future__ import annotations

import pytest
import torch

from fastvlm.functional.best import best_columns


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_best_columns_are_torchs(dtype: torch.dtype) -> None:
    # In 16 bits most rows have equals.
    scores = torch.randn(2, 40, 5000).to(dtype)
    scores[0, 0], scores[0, 1] = -torch.inf, 3.0
    scores[0, 2, 7] = torch.nan
    scores[1, :, 4999] = torch.inf
    assert torch.equal(best_columns(scores), scores.argmax(-1))
    assert torch.equal(best_columns(scores.transpose(1, 2)), scores.argmax(1))
