"""The options of a batch norm, in a single list that the function and the layers share."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxbn import _call_checks, _checks, _device_checks
from jaxbn._call import Call
from jaxbn._moments import statistics_dtype
from jaxbn._running import Estimator


class Options(NamedTuple):
    """How the statistics are computed, tracked and used. `batch_norm` documents each option.

    To add an option, list it here and check it below. Add it to the signature, the docstring and
    the `Options` of `batch_norm`, and to the attributes and docstrings of the two layers. A table
    in tests/test_options.py needs a bad value of it.
    """

    axis: int | Sequence[int]
    momentum: float | None
    epsilon: float
    batch_variance: Estimator
    running_variance: Estimator
    axis_name: Hashable | Sequence[Hashable] | None
    axis_index_groups: Sequence[Sequence[int]] | None
    virtual_batch_size: int | None

    @classmethod
    def of(cls, layer: Any) -> "Options":
        """Return the options that a layer has as attributes of the same names."""
        return cls(*(getattr(layer, name) for name in cls._fields))

    def check(self) -> None:
        """Check that each option is valid by itself."""
        _checks.axis(self.axis)
        _checks.momentum(self.momentum)
        _checks.epsilon(self.epsilon)
        _checks.estimator("batch_variance", self.batch_variance)
        _checks.estimator("running_variance", self.running_variance)
        _checks.axis_name(self.axis_name)
        _checks.axis_index_groups(self.axis_index_groups, self.axis_name)
        _checks.virtual_batch_size(self.virtual_batch_size)

    def check_fit(self, call: Call, state: Mapping[str, Any] | None) -> None:
        """Check that the options fit a call: its shapes, its dtype, its state and its devices."""
        _call_checks.momentum(self.momentum, state, call.train)
        _call_checks.epsilon(self.epsilon, call.use_batch, statistics_dtype(call.x.dtype))
        if self.momentum is None and call.mask is not None and call.train and state is not None:
            shape, axes = call.mask.shape, call.feature_axes
            _call_checks.cumulative_average(shape, axes, self.running_variance)
        if not call.use_batch:
            return
        devices = (self.axis_name, self.axis_index_groups)
        _device_checks.axis_name(*devices)
        if "unbiased" in (self.batch_variance, self.running_variance):
            # Devices share the values of a batch, but not those of a group.
            among = devices if call.ghosts is None else (None, None)
            shape, axes = call.x.shape, call.feature_axes
            _device_checks.more_than_one_value(shape, axes, call.ghosts, *among)
