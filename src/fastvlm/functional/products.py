"""Products with a matrix that is laid out once, by what its precision allows.

`half`: the matrix in 16 bits, multiplied and summed in float32. Checkpoints are mostly stored in
bfloat16 or float16, and a model that computes in float32 reads each of their weights as 4 bytes of
which 2 are zeros. Where a matrix has the same values in float16, times a power of two, half of the
bytes give the same products.

`onednn`: the matrix as it is, in oneDNN's own layout.

In bfloat16 both have their place: one row waits for memory, which FBGEMM reads faster, and many
wait for arithmetic, which a processor does faster in bfloat16. So a matrix is held in both layouts
where there is room, and the number of rows says which one multiplies.

Each computes a row alike whatever rows are beside it, but for those of prompts.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST_IN_16_BITS = 2**16
SMALLEST_IN_32_BITS = 2**18
"""Weights of a matrix that is worth packing: of fewer, the call costs more than is saved."""
SMALLEST_FOR_THREADS = 2**20
"""Weights of a matrix that threads may share: of fewer, calling them costs more than is saved."""
ROWS, MANY_ROWS = 16, 1024
"""Rows of the products that oneDNN's layout is made for: of few, and of an encoder's positions."""
PROMPT_POSITIONS = 64
"""Positions beyond which a pass is a prompt's: drafts are shorter by default."""
FEW_ROWS = 5
"""Rows that FBGEMM multiplies sooner than oneDNN in bfloat16, a whole pass of a model."""
FLOAT32_ROUNDING = 2.0**-24
"""The relative error of a number that is rounded to float32."""
LARGEST_EXPONENT = 15
"""Scaled weights lie below 2 to the power of it, as float16 ends at 65,504."""
CHUNK_WEIGHTS = 2**20
"""Weights that are looked at together, as copies of them stay in a cache: a third of the time."""
DIRECT = "fbgemm_linear_fp16_weight_fp32_activation"
"""What torch calls FBGEMM's products in float16, as a plain function."""
TRIALS = 3
"""Products of one row in a measurement."""


class Product(Protocol):
    """What multiplies by a packed matrix."""

    @property
    def nbytes(self) -> int:
        """Bytes that the packed matrix takes."""
        ...

    @property
    def read_bytes(self) -> int:
        """Bytes of it that a product of few rows reads."""
        ...

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product of (..., in_features), (..., out_features).

        Args:
            x: The rows.
            weight: The matrix as it was before it was packed: (out_features, in_features).
            bias: What is added: (out_features,).
        """
        ...


def available() -> bool:
    """Return whether this CPU and this torch pack weights."""
    capability = torch.backends.cpu.get_cpu_capability()
    return torch.backends.mkldnn.is_available() and capability.startswith("AVX")


class HalfFunctions(NamedTuple):
    """FBGEMM's products with matrices in float16.

    Args:
        pack: Lays out a float32 matrix, (out, in).
        multiply: Multiplies float32 rows by a matrix that was laid out; adds nothing.
    """

    pack: Callable[[Tensor], Any]
    multiply: Callable[..., Tensor]


@cache
def half_functions() -> HalfFunctions | None:
    """Return FBGEMM's products as this torch has them; None where it has none."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    # The same kernel by a function that takes a tenth of the time to call; torch means to remove
    # it, and earlier releases want a bias.
    found: Any = getattr(torch.ops.aten, DIRECT, None)
    bias = None if found is None else found.default._schema.arguments[-1]
    if bias is not None and isinstance(bias.type, torch.OptionalType):
        with warnings.catch_warnings():
            # It says so once, at the first call.
            warnings.simplefilter("ignore")
            trial = torch.fbgemm_pack_gemm_matrix_fp16(torch.zeros(1, 1))
            getattr(torch, DIRECT)(torch.zeros(1, 1), trial, None)
        return HalfFunctions(torch.fbgemm_pack_gemm_matrix_fp16, getattr(torch, DIRECT))
    return half_functions_in_threads()


@cache
def half_functions_in_threads() -> HalfFunctions | None:
    """Return FBGEMM's products that torch's threads share, with the same sums; None without any."""
    if not hasattr(torch.ops.quantized, "linear_dynamic_fp16"):
        return None
    multiply = torch.ops.quantized.linear_dynamic_fp16.default
    return HalfFunctions(
        lambda weight: torch.ops.quantized.linear_prepack_fp16(weight, None),
        lambda x, packed, _: multiply(x, packed),
    )


@cache
def half_gains() -> bool:
    """Return whether FBGEMM multiplies a row sooner than oneDNN does in bfloat16.

    It does on processors without tiles for bfloat16 (AMX), as far as this torch tells. That is not
    measured, as the two round differently: a process that found the other one faster, as the
    machine was busy, could decode other tokens.
    """
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return half_functions() is not None and has_tiles is not None and not has_tiles()


def packs(dtype: torch.dtype) -> bool:
    """Return whether matrices of a precision are packed here."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 or (dtype == torch.float16 and half_functions() is not None)


def product_of(weight: Tensor, *, twice: bool = False) -> Product | None:
    """Return what multiplies by a matrix, packed; None where packing doesn't pay.

    Args:
        weight: A contiguous matrix on a CPU, of a precision that `packs`: (out, in).
        twice: Whether it may be held in two layouts.
    """
    if weight.numel() < SMALLEST_IN_16_BITS:
        return None
    if weight.dtype == torch.bfloat16:
        few = _half_product(weight) if twice and half_gains() else None
        many = OneDnnProduct(weight)
        return many if few is None else ProductByRows(few, many, FEW_ROWS * weight.shape[1])
    half = _half_product(weight)
    small = weight.dtype == torch.float32 and weight.numel() < SMALLEST_IN_32_BITS
    if half is not None or small or weight.dtype == torch.float16:
        return half
    return OneDnnProduct(weight)


def product_of_many(weight: Tensor) -> OneDnnProduct | None:
    """Return what multiplies many rows by a matrix, packed; None where packing doesn't pay.

    Args:
        weight: As of `product_of`.
    """
    small = weight.numel() < SMALLEST_IN_16_BITS or weight.dtype == torch.float16
    return None if small else OneDnnProduct(weight, MANY_ROWS)


def _half_product(weight: Tensor) -> HalfProduct | None:
    """Return what multiplies by a matrix in float16; None where there is none with its values."""
    functions = half_functions()
    scale = None if functions is None else half_scale(weight)
    if functions is None or scale is None:
        return None
    if torch.get_num_threads() == 1:
        return HalfProduct(weight, scale, functions)
    if weight.numel() >= SMALLEST_FOR_THREADS:
        return HalfProduct(weight, scale, half_functions_in_threads() or functions)
    # Of plain matrices a processor multiplies those in float32 well.
    plain = weight.dtype == torch.float32
    return HalfProduct(weight, scale, functions, PROMPT_POSITIONS if plain else sys.maxsize)


def half_scale(weight: Tensor) -> float | None:
    """Return the power of two with which a matrix has the same values in float16.

    The same but for errors below those of float32 itself, in each row. None where there is none.

    Args:
        weight: (out, in).
    """
    largest = float(weight.abs().amax()) if weight.numel() < CHUNK_WEIGHTS else _largest(weight)
    if not 0 < largest < float("inf"):
        return None
    _, exponent = torch.frexp(torch.tensor(largest))
    for power in (0, LARGEST_EXPONENT - int(exponent)):
        scale = 2.0**power
        if largest * scale < 2.0**LARGEST_EXPONENT and all(
            _is_same(part, scale) for part in _parts(weight)
        ):
            return scale
    return None


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(max(CHUNK_WEIGHTS // weight.shape[1], 1))


def _largest(weight: Tensor) -> float:
    return max(float(part.abs().amax()) for part in _parts(weight))


def _is_same(weight: Tensor, scale: float) -> bool:
    scaled = weight.float() * scale
    error = (scaled.half().float() - scaled).norm(dim=1)
    return bool((error <= FLOAT32_ROUNDING * scaled.norm(dim=1)).all())


class HalfProduct:
    """Multiplies by a matrix in float16; products and sums are float32's.

    Args:
        weight: The matrix: (out, in).
        scale: The power of two that it is multiplied by, see `half_scale`.
        functions: What packs and multiplies.
        most_positions: How many of a row it multiplies. Threads share no product of it, which only
            a prompt's is long enough for: such a one is that of the plain matrix.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: float,
        functions: HalfFunctions,
        most_positions: int = sys.maxsize,
    ) -> None:
        self.most_positions = most_positions
        self.nbytes = self.read_bytes = 2 * weight.numel()
        scaled = weight.float() if scale == 1 else weight.float() * scale
        self.packed = functions.pack(scaled)
        self.multiply = functions.multiply
        self.unscale = None if scale == 1 else 1 / scale

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product. See `Product`."""
        dtype = weight.dtype
        if x.dim() > 1 and x.shape[-2] > self.most_positions:
            return F.linear(x, weight, bias)
        found = self.multiply(x if dtype == torch.float32 else x.float(), self.packed, None)
        if self.unscale is not None:
            found.mul_(self.unscale)
        if bias is not None:
            found.add_(bias)
        return found if dtype == torch.float32 else found.to(dtype)


class OneDnnProduct:
    """Multiplies by a matrix in oneDNN's layout; by the plain one where that is faster for one row.

    Args:
        weight: The matrix: (out, in).
        rows: Rows of the products that it is for. Of one row nothing is measured where it is for
            many.
    """

    def __init__(self, weight: Tensor, rows: int = ROWS) -> None:
        self.nbytes = self.read_bytes = weight.nbytes
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
        self.plain_elements = 0
        if rows > ROWS:
            return
        # One number for all matrices of a shape, or equal layers would round differently.
        key = tuple(weight.shape), weight.dtype, torch.get_num_threads()
        if key not in _one_row_packed:
            _one_row_packed[key] = self._is_faster(weight)
        self.plain_elements = 0 if _one_row_packed[key] else weight.shape[1]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product. See `Product`."""
        if x.numel() == self.plain_elements:
            return F.linear(x, weight, bias)
        return self.multiply(x, self.packed, bias, "none", [], "")

    def gelu(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return GELU of the product."""
        return self.multiply(x, self.packed, bias, "gelu", [], "none")

    @torch.no_grad()
    def _is_faster(self, weight: Tensor) -> bool:
        """Measure products of one row, in turns: a few milliseconds for a matrix of megabytes."""
        x = torch.ones(1, weight.shape[1], dtype=weight.dtype)
        packed, plain = [], []
        for _ in range(TRIALS):
            started = time.perf_counter()
            F.linear(x, weight)
            between = time.perf_counter()
            self.multiply(x, self.packed, None, "none", [], "")
            packed.append(time.perf_counter() - between)
            plain.append(between - started)
        return min(packed) < min(plain)


class ProductByRows:
    """Multiplies few rows by one layout of a matrix, and many by another.

    Args:
        few: Multiplies few rows.
        many: Multiplies more.
        most_elements: Elements of the most rows that are few.
    """

    def __init__(self, few: Product, many: Product, most_elements: int) -> None:
        self.few = few
        self.many = many
        self.most_elements = most_elements
        self.nbytes = few.nbytes + many.nbytes
        self.read_bytes = few.read_bytes

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product. See `Product`."""
        product = self.few if x.numel() <= self.most_elements else self.many
        return product(x, weight, bias)


_one_row_packed: dict[tuple[tuple[int, ...], torch.dtype, int], bool] = {}
"""Whether products of one row are faster with the packed matrix: by shape, precision, threads."""
