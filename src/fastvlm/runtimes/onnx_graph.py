"""A graph for ONNX Runtime under construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import torch
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from fastvlm.functional.threads import usual_threads
from fastvlm.runtimes.quantised_weights import BLOCKS, QuantisedMatrices

OPSET, CONTRIBUTED_OPSET, IR_VERSION = 24, 1, 11
CONTRIBUTED = "com.microsoft"
CONTRIBUTED_OPS = frozenset(
    {
        "FusedMatMul",
        "GroupQueryAttention",
        "MatMulNBits",
        "QuickGelu",
        "SkipSimplifiedLayerNormalization",
    }
)
"""Operators of ONNX Runtime's own."""
SMALL_BYTES = 2**16
"""Matrices of up to so many bytes lie in the graph itself, as all vectors do."""
MATRIX_AXES = 2
INTEGER_PRODUCTS = 4
"""The accuracy level of `MatMulNBits` that computes in 8-bit integers."""


class OnnxGraph:
    """A graph under construction: operators, weights, inputs and outputs.

    Args:
        bits: Bits of the weights of linear layers: 8 or 4; None for float32.
        matrices: Those that other graphs have in these bits too; None for none.
    """

    sessions: ClassVar[int] = 0
    """How many graphs were made ready to run, whoever made them."""

    def __init__(self, bits: int | None = None, matrices: QuantisedMatrices | None = None) -> None:
        self.bits = bits
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.initializers: list[TensorProto] = []
        self.large: dict[str, np.ndarray[Any, Any]] = {}
        """Weights that the session is handed where they lie."""
        self._read: list[str] = []
        """Those weights that the session reads where they lie, whatever it packs."""
        self._constants: dict[tuple[int, ...], str] = {}
        self._weights: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
        """By where they lie, where they stay: a graph may multiply by one several times."""
        self._matrices = matrices

    def input(self, name: str, dtype: int, shape: Sequence[str | int] | None) -> str:
        """Declare an input; return its name.

        Args:
            name: The name.
            dtype: One of `TensorProto`'s types.
            shape: Its sizes, a name for one that varies; None for any number of axes.
        """
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, shape: Sequence[str | int] | None) -> str:
        """Declare an output in float32; return its name."""
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def add(
        self, op: str, inputs: Sequence[str], outputs: int | Sequence[str] = 1, **given: Any
    ) -> Any:
        """Add an operator.

        Args:
            op: Its name.
            inputs: Names of its inputs, empty for one that is left out.
            outputs: How many outputs it has, or their names.
            given: Its attributes.

        Returns:
            The name of its output; a list where there are several.
        """
        names = list(outputs) if not isinstance(outputs, int) else self._names(op, outputs)
        domain = CONTRIBUTED if op in CONTRIBUTED_OPS else ""
        self.nodes.append(helper.make_node(op, inputs, names, domain=domain, **given))
        return names[0] if len(names) == 1 else names

    def weight(self, values: Tensor) -> str:
        """Add a weight, once; return its name."""
        key = values.data_ptr(), tuple(values.shape), values.stride(), values.dtype
        if key not in self._weights:
            self._weights[key] = self._added(values), values
        return self._weights[key][0]

    def rows(self, table: Tensor, places: str) -> str:
        """Add a look-up of a table's rows: (...) to (..., size).

        Args:
            table: (rows, size).
            places: Which rows: (...).
        """
        name = self.weight(table)
        self._read.append(name)
        found: str = self.add("Gather", [name, places])
        return found

    def _quantised(self, weight: Tensor, bits: int) -> list[str]:
        """Add a matrix of whole numbers, once; return the names of what it is made of."""
        if self._matrices is None:
            self._matrices = QuantisedMatrices(bits)
        whole = self._matrices.of(weight)
        zeros = "" if whole.zeros is None else self.weight(whole.zeros)
        return [self.weight(whole.values), self.weight(whole.scales), zeros]

    def _added(self, values: Tensor) -> str:
        name = f"weight{len(self.initializers)}"
        array = values.detach().contiguous().numpy()
        if array.ndim < MATRIX_AXES or array.nbytes <= SMALL_BYTES:
            self.initializers.append(numpy_helper.from_array(array, name))
            return name
        held = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
        held.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        for key, value in (("location", name), ("offset", 0), ("length", array.nbytes)):
            held.external_data.add(key=key, value=str(value))
        self.initializers.append(held)
        self.large[name] = array
        return name

    def constant(self, *values: int) -> str:
        """Return the name of a list of whole numbers."""
        if values not in self._constants:
            self._constants[values] = self.weight(torch.tensor(values))
        return self._constants[values]

    def scalar(self, value: float) -> str:
        """Return the name of a number."""
        return self.weight(torch.tensor(value))

    def linear(self, x: str, weight: Tensor, bias: Tensor | None = None) -> str:
        """Add a product with a matrix: (..., inputs) to (..., outputs).

        Args:
            x: The inputs.
            weight: (outputs, inputs).
            bias: What is added: (outputs,).
        """
        outputs, inputs = weight.shape
        if self.bits is None:
            x = self.add("FusedMatMul", [x, self.weight(weight)], transB=1)
        else:
            sizes = {"K": inputs, "N": outputs, "bits": self.bits, "block_size": BLOCKS[self.bits]}
            given = [x, *self._quantised(weight, self.bits)]
            if bias is not None:
                given += ["", self.weight(bias)]
            found: str = self.add("MatMulNBits", given, **sizes, accuracy_level=INTEGER_PRODUCTS)
            return found
        return x if bias is None else self.add("Add", [x, self.weight(bias)])

    def branch(self, name: str, nodes: Sequence[NodeProto], outputs: Sequence[str]) -> GraphProto:
        """Return a graph for one side of an `If`: nodes that read the names of this graph."""
        made = [helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in outputs]
        return helper.make_graph(nodes, name, [], made)

    @usual_threads()
    def session(self, threads: int | None = None) -> tuple[onnxruntime.InferenceSession, object]:
        """Return the graph ready to run, and what must be kept as long as it is used.

        Args:
            threads: How many it computes with; None for as many as torch does.
        """
        OnnxGraph.sessions += 1
        graph = helper.make_graph(self.nodes, "graph", self.inputs, self.outputs, self.initializers)
        opsets = [
            helper.make_opsetid("", OPSET),
            helper.make_opsetid(CONTRIBUTED, CONTRIBUTED_OPSET),
        ]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        # Several sessions take turns: the threads of one must not spin while another computes.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(one) for one in self.large.values()]
        if values:
            options.add_external_initializers(list(self.large), values)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        # In float32 the session has packed its large matrices, and reads its own copy alone.
        read = self.large if self.bits is not None else set(self._read) & self.large.keys()
        return session, [self.large[name] for name in read]

    def _names(self, op: str, number: int) -> list[str]:
        return [f"{op}{len(self.nodes)}_{index}" for index in range(number)]
