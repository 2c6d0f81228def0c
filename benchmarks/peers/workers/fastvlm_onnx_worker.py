"""fastvlm with ONNX Runtime, in the same ways as with torch."""

from __future__ import annotations

from functools import partial

from fastvlm_worker import FastVlm
from worker_protocol import serve

if __name__ == "__main__":
    serve(partial(FastVlm, runtime="onnx"))
