"""Run a network of a JAX framework, compiled, and record what its submodules return."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state

from jaxbn.parity._networks.layers import Facts, require_channels_last
from jaxbn.parity._networks.network import (
    INPUT,
    OUTPUT,
    Call,
    Run,
    cotangent_of,
    require_array,
    require_one_call,
)


class Recorder:
    """Record the calls of submodules while a forward pass is traced.

    Args:
      label: what messages call the network.
      x: the input of the network.
      zeros: the names to record, and an array of zeros for each, which is added to the output. The
        gradient with respect to it is that with respect to the output.

    Attributes:
      calls: the calls so far.
      values: the outputs of the submodules that are recorded.
      norm_inputs: the inputs of the batch norms among them, of shape (rows, C).
      dropouts: the names of the dropouts that were active.
      outputs: the output of each submodule, or only its shape and dtype if it is a single array.
    """

    def __init__(self, label: str, x: jax.Array, zeros: Mapping[str, jax.Array]):
        self.label, self.x, self.zeros = label, x, zeros
        self.calls: list[Call] = []
        self.values: dict[str, jax.Array] = {}
        self.norm_inputs: dict[str, jax.Array] = {}
        self.dropouts: list[str] = []
        self.outputs: dict[str, Any] = {}
        self._returned: list[tuple[Any, str]] = []
        self._trace = get_opaque_trace_state()

    def record(
        self,
        name: str,
        facts: Callable[[], Facts | None],
        axis: Any,
        call: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Make the call of a submodule, record it, and return its output.

        Args:
          name: the name of the submodule.
          facts: returns what is known about it; called before and after, since the first call of a
            Linen module makes its parameters.
          axis: its feature axis, if it has one.
          call, args, kwargs: the call.
        """
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, jax.Array)), None)
        layer = facts()
        if x is not None and _takes_features_last(layer, axis, x.ndim):
            require_channels_last(self.label, name, layer, self.x.shape, x.shape)
        y = call(*args, **kwargs)
        layer = facts()
        source = next((k for other, k in reversed(self._returned) if other is x), None)
        transformed = get_opaque_trace_state() != self._trace
        self.calls.append(Call(name, layer, source, transformed))
        if name in self.zeros:
            y = y + self.zeros[name]
            self.values[name] = y
            if layer is not None and layer.kind == "batch norm" and isinstance(axis, int):
                assert x is not None
                self.norm_inputs[name] = jnp.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
        if layer is not None:
            self._returned.append((y, name))
        is_array = isinstance(y, jax.Array)
        self.outputs[name] = jax.ShapeDtypeStruct(y.shape, y.dtype) if is_array else y
        return y


def _takes_features_last(layer: Facts | None, axis: Any, ndim: int) -> bool:
    """Return whether features are on the last axis of a layer's input, as far as that is known."""
    if axis is None:
        return layer is None or layer.kind != "batch norm"
    return axis in (-1, ndim - 1)


# The running mean and variance of each submodule, as arrays of JAX.
TracedStatistics = dict[str, tuple[Any, Any]]


class JaxNetwork:
    """A network as a pure function of its variables, which the derived classes give as `forward`.

    Args:
      label: what messages call the network.
      variables: the variables, a tree of arrays.
    """

    def __init__(self, label: str, variables: Any):
        self.label, self.variables = label, variables
        self._traces: dict[Any, tuple[Recorder, jax.ShapeDtypeStruct]] = {}

    def forward(
        self, variables: Any, x: jax.Array, train: bool, recorder: Recorder
    ) -> tuple[Any, TracedStatistics]:
        """Return the output and the running statistics after it, and report all calls."""
        raise NotImplementedError

    def check_dtype(self, x: np.ndarray) -> None:
        """Accept any dtype, since JAX promotes."""

    def calls(self, x: np.ndarray, train: bool) -> list[Call]:
        return self._trace(jnp.asarray(x), train)[0].calls

    def run(self, names: Sequence[str], x: np.ndarray, train: bool) -> Run:
        values = jnp.asarray(x)
        traced, output = self._trace(values, train)
        require_one_call(self.label, names, [call.name for call in traced.calls])
        self._require_recordable(names, traced)
        zeros = {}
        for name in names:
            y = traced.outputs[name]
            require_array(self.label, name, y, jax.ShapeDtypeStruct)
            zeros[name] = jnp.zeros(y.shape, y.dtype)
        # Integers, such as tokens, have no gradient.
        if jnp.issubdtype(values.dtype, jnp.floating):
            zeros[INPUT] = jnp.zeros_like(values)

        @jax.jit
        def forward_and_backward(variables, zeros, x, cotangent):
            def of_zeros(zeros):
                inputs = x + zeros[INPUT] if INPUT in zeros else x
                recorder = Recorder(self.label, inputs, zeros)
                output, statistics = self.forward(variables, inputs, train, recorder)
                return output, (recorder.values, statistics, recorder.norm_inputs)

            output, vjp, recorded = jax.vjp(of_zeros, zeros, has_aux=True)
            return output, vjp(cotangent)[0], recorded

        cotangent = jnp.asarray(cotangent_of(output.shape), output.dtype)
        results = forward_and_backward(self.variables, zeros, values, cotangent)
        output, gradients, recorded = jax.tree.map(np.asarray, results)
        intermediates, statistics, norm_inputs = recorded
        values = {**intermediates, OUTPUT: output}
        return Run(values, gradients, statistics, norm_inputs, traced.dropouts)

    def astype(self, dtype: str) -> Self:
        def cast(leaf: Any) -> Any:
            return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        result = copy.copy(self)
        result.variables = jax.tree.map(cast, self.variables)
        result._traces = {}
        return result

    def _trace(self, x: jax.Array, train: bool) -> tuple[Recorder, jax.ShapeDtypeStruct]:
        """Return what a forward pass records, and the shape of its output, without computing."""
        key = (x.shape, x.dtype, train)
        if key not in self._traces:
            recorders = []

            def forward(variables, x):
                recorders.append(Recorder(self.label, x, {}))
                return self.forward(variables, x, train, recorders[-1])[0]

            output = jax.eval_shape(forward, self.variables, x)
            require_array(self.label, OUTPUT, output, jax.ShapeDtypeStruct)
            self._traces[key] = recorders[-1], output
        return self._traces[key]

    def _require_recordable(self, names: Sequence[str], traced: Recorder) -> None:
        for call in traced.calls:
            if call.name in names and call.transformed:
                raise ValueError(
                    f"{call.name} in {self.label} is inside a transformation, such as nn.scan or "
                    "nn.remat, so its output cannot be recorded; leave it out of names."
                )
