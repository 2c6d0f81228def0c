"""A target's fingerprint: which decoder a draft was made for."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel

from fastvlm.language.families import text_decoder

SAMPLE = 64


def fingerprint(model: PreTrainedModel) -> str:
    """Return 16 hexadecimal digits that tell a decoder's weights from another's.

    Every parameter's name and shape and some of its values count, rounded to bfloat16, so that the
    same checkpoint has the same fingerprint in bfloat16 and in float32.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(text_decoder(model).named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        values = parameter.detach().flatten()[:SAMPLE].to("cpu", torch.bfloat16)
        digest.update(bytes(values.view(torch.uint8).tolist()))
    return digest.hexdigest()[:16]
