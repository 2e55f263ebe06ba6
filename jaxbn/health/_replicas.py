"""Find copies of the running statistics on several devices that are not equal."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._patterns import as_text
from jaxbn.calibrate._batches import join, split
from jaxbn.calibrate._observable import observable
from jaxbn.calibrate._observe import ObservableModel
from jaxbn.calibrate._statistics import leaf_indices
from jaxbn.health._distance import State
from jaxbn.health._finding import Finding
from jaxbn.health._running_statistics import feature

# Devices may round differently.
_ROUNDING = 1e-5


def one_copy(
    model: Any, variables: Any, batches: Iterable[Any], apply_kwargs: Mapping[str, Any]
) -> tuple[Any, list[Finding]]:
    """Return the variables of one device, and a finding for each layer whose copies differ.

    Variables hold copies if all running statistics have a leading axis of the same size, and the
    model fits the variables only without that axis. Arrays that are marked as replicated on several
    devices hold copies too, and these may differ.

    Args:
      model: the model.
      variables: its variables, with or without a leading axis of copies.
      batches: the batches. Only the first is used.
      apply_kwargs: further arguments of the model.
    """
    given = observable(model, variables, apply_kwargs)
    statistics = given.statistics
    findings = list(_differences(_device_copies(statistics)))
    size = _leading_size(statistics)
    if size is None or _fits(given, batches):
        return variables, findings

    of_layers = {i for names in _statistics_indices(statistics).values() for i in names.values()}
    leaves, structure = jax.tree.flatten(statistics)
    first = [_first(leaf, size) if i in of_layers else leaf for i, leaf in enumerate(leaves)]
    only_statistics = given.replace_statistics(structure.unflatten(first))
    everything = jax.tree.map(lambda leaf: _first(leaf, size), variables)
    for candidate in (only_statistics, everything):
        if _fits(observable(model, candidate, apply_kwargs), batches):
            if candidate is everything:
                _check_parameters(variables, size)
            copies = {
                path: State.of(*(leaves[names[name]] for name in ("mean", "var")))
                for path, names in _statistics_indices(statistics).items()
            }
            return candidate, findings + list(_differences(copies))
    # The model fits none of them. The caller runs it next, and its own error says why.
    return variables, findings


def _statistics_indices(statistics: Any) -> dict[tuple[Any, ...], dict[Any, int]]:
    """Return the indices of the leaves that are running statistics, by layer and name."""
    return {
        layer: {name: names[name] for name in ("mean", "var", "count") if name in names}
        for layer, names in leaf_indices(statistics).items()
        if {"mean", "var"} <= names.keys()
    }


def _leading_size(statistics: Any) -> int | None:
    """Return the size of the leading axis if it is the same in all running statistics."""
    leaves = jax.tree.leaves(statistics)
    shapes = [
        np.shape(leaves[names[name]])
        for names in _statistics_indices(statistics).values()
        for name in ("mean", "var")
    ]
    sizes = {shape[0] if len(shape) > 1 else 0 for shape in shapes}
    return sizes.pop() if len(sizes) == 1 and min(sizes) > 0 else None


def _first(leaf: Any, size: int) -> Any:
    """Return the first copy, or the leaf itself if it has no axis of copies."""
    if np.shape(leaf)[:1] != (size,):
        return leaf
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf[0]
    return jnp.asarray(np.asarray(leaf)[0])


def _fits(model: ObservableModel, batches: Iterable[Any]) -> bool:
    """Return whether the model runs on the first batch, and its statistics have the layers' shapes.

    Without a batch there is nothing to run, and any model fits.
    """
    batch = next(iter(batches), None)
    if batch is None:
        return True
    arrays, constants = split(batch)
    shapes = {
        layer: np.shape(jax.tree.leaves(model.statistics)[names["mean"]])
        for layer, names in _statistics_indices(model.statistics).items()
    }

    def observed(every_call: bool) -> dict[tuple[Any, ...], Any]:
        def run(variables: Any, arrays: Any) -> Any:
            return model.observe(variables, {}, join(arrays, constants), every_call).calls

        return jax.eval_shape(run, model.variables, arrays)

    try:
        calls = observed(False) or observed(True)
    except Exception:  # Any error can follow from wrong shapes.
        return False
    return all(
        call.var.shape == shapes.get(layer)
        for layer, of_layer in calls.items()
        for call in of_layer
    )


def _check_parameters(variables: Any, size: int) -> None:
    from flax import nnx

    is_state = isinstance(variables, nnx.State)
    parameters = nnx.filter_state(variables, nnx.Param) if is_state else variables["params"]
    for path, leaf in jax.tree_util.tree_flatten_with_path(parameters)[0]:
        if np.shape(leaf)[:1] == (size,) and np.any(np.asarray(leaf) != np.asarray(leaf)[:1]):
            raise ValueError(
                f"variables must be those of one model, got {size} copies whose parameters differ "
                f"at {jax.tree_util.keystr(path)}, as in an ensemble. Check each copy i "
                f"separately, with the variables jax.tree.map(lambda leaf: leaf[i], variables)."
            )


def _device_copies(statistics: Any) -> dict[tuple[Any, ...], State]:
    """Return the statistics that are replicated on several devices, stacked on a new first axis."""
    leaves = jax.tree.leaves(statistics)
    return {
        layer: State.of(*(_parts(leaves[names[name]]) for name in ("mean", "var")))
        for layer, names in _statistics_indices(statistics).items()
        if all(_is_replicated(leaves[names[name]]) for name in ("mean", "var"))
    }


def _is_replicated(leaf: Any) -> bool:
    return (
        isinstance(leaf, jax.Array)
        and leaf.is_fully_replicated
        and len(leaf.addressable_shards) > 1
    )


def _parts(leaf: jax.Array) -> np.ndarray:
    return np.stack([np.asarray(shard.data) for shard in leaf.addressable_shards])


def _differences(copies: Mapping[tuple[Any, ...], State]) -> Iterator[Finding]:
    """Yield a finding for each layer whose copies, on the first axis, are not equal."""
    for path, (mean, var) in copies.items():
        with np.errstate(all="ignore"):
            std = np.sqrt(np.abs(var))
            unit = np.sqrt(np.mean(var, 0)) + np.finfo(np.float32).tiny
            spread = np.maximum(np.ptp(mean, 0), np.ptp(std, 0)) / unit
            rounding = _ROUNDING * (1 + np.max(np.abs(mean), 0) / unit)
            differs = spread > rounding
        if np.any(differs):
            worst = int(np.argmax(np.where(differs, spread, 0)))
            yield Finding(
                as_text(path),
                "replicas-differ",
                f"The running statistics of {len(mean)} devices differ by up to "
                f"{spread.flat[worst]:.3g} standard deviations (feature "
                f"{feature(spread.shape, worst)}). Each device tracked only its own share of the "
                f"data. Merge the statistics (jaxbn.calibrate.merge), and share them in training: "
                f"give the layers an axis_name, or average the statistics over the devices "
                f"(jax.lax.pmean).",
            )
