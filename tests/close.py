"""Compare trees of arrays: structures, shapes, dtypes and values."""

from typing import Any

import jax
import numpy as np


def assert_close(
    got: Any, wanted: Any, tolerance: float, *, of_largest: bool = False, dtypes: bool = True
) -> None:
    """Check that each leaf is within `tolerance` of the wanted one, relative and absolute.

    With `of_largest`, the absolute tolerance of a leaf is multiplied by one plus its largest value.
    Without `dtypes`, leaves may differ in dtype.
    """

    def close(a: Any, b: Any) -> None:
        assert np.shape(a) == np.shape(b)
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype or not dtypes
        a, b = a.astype(np.float64), b.astype(np.float64)
        atol = tolerance * (1 + np.abs(b).max(initial=0) if of_largest else 1)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=atol)

    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(close, got, wanted)


def assert_equal(got: Any, wanted: Any) -> None:
    """Check that each leaf has the dtype and the values of the wanted one."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert [v.dtype for v in jax.tree.leaves(got)] == [v.dtype for v in jax.tree.leaves(wanted)]
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
