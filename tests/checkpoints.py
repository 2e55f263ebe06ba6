"""Checkpoints of small trained networks in every format that `python -m jaxbn.health` reads."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests.small_networks import net, torch_net

BATCHES = 3


class NNXNet(nnx.Module):
    """A list of twelve norms, which are named by numbers."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norms = nnx.List([jaxbn.nnx.BatchNorm(8, rngs=rngs) for _ in range(12)])

    def __call__(self, x):
        for norm in self.norms:
            x = norm(x)
        return x


def images(seed):
    return np.random.default_rng(seed).normal(2, 3, (8, 6, 6, 3)).astype(np.float32)


def linen_variables():
    """Return the variables of a Linen network after training steps, and the paths of its norms."""
    model = net()
    variables = model.init(jax.random.key(0), images(0), train=False)
    for seed in range(BATCHES):
        updates = model.apply(variables, images(seed), train=True, mutable=["batch_stats"])[1]
        variables = {**variables, **updates}
    stats = variables["batch_stats"]
    return variables, {"block/bn": stats["block"]["bn"], "bn1": stats["bn1"]}


def nnx_state():
    """Return the state of an NNX network after training steps, and the paths of its norms."""
    model = NNXNet()
    for seed in range(BATCHES):
        model(jnp.asarray(images(seed).reshape(-1, 8)))
    norms = {f"norms/{k}": norm for k, norm in enumerate(model.norms)}
    return nnx.state(model), {
        path: {"mean": norm.mean[...], "var": norm.var[...]} for path, norm in norms.items()
    }


def torch_state(dtype=torch.float32):
    """Return the state dict of a PyTorch network after training steps, and its norms' names."""
    model = torch_net(torch.float32)
    for seed in range(BATCHES):
        model(torch.from_numpy(images(seed)).movedim(-1, 1))
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    names = ("bn1", "block.bn")
    norms = {name: (state[f"{name}.running_mean"], state[f"{name}.running_var"]) for name in names}
    # NumPy has no bfloat16, and float32 holds its values.
    return state, {
        name: {"mean": mean.float().numpy(), "var": var.float().numpy()}
        for name, (mean, var) in norms.items()
    }


def below(prefix, norms):
    return {f"{prefix}{path}": norm for path, norm in norms.items()}


def save_standard(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def orbax_linen(folder):
    variables, norms = linen_variables()
    save_standard(folder / "linen", variables)
    return folder / "linen", below("batch_stats/", norms)


def orbax_boxed(folder):
    """Save boxed variables, like partitioned parameters, whose names end in "value"."""
    variables, norms = linen_variables()
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), variables)
    save_standard(folder / "boxed", boxed)
    return folder / "boxed", below("batch_stats/", norms)


def orbax_nnx(folder):
    state, norms = nnx_state()
    save_standard(folder / "nnx", state)
    return folder / "nnx", norms


def orbax_sharded(folder):
    """Save variables with a copy for each device, sharded over all devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    variables, norms = linen_variables()
    shape = (jax.device_count(),)
    stacked = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, shape + leaf.shape), variables)
    save_standard(folder / "sharded", jax.device_put(stacked, NamedSharding(mesh, P("data"))))
    return folder / "sharded", below("batch_stats/", norms)


def orbax_tree(folder):
    """Save a tree with lists and an optimizer's state, in the oldest layout."""
    variables, norms = linen_variables()
    moments = jax.tree.map(jnp.zeros_like, variables)
    tree = {"nets": [variables], "opt_state": ({"mu": moments},), "epoch": 3}
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
    checkpointer.save(folder / "tree", args=ocp.args.PyTreeSave(tree))
    return folder / "tree", below("nets/0/batch_stats/", norms)


def orbax_manager(folder, items=("state",)):
    """Save the steps 9, which has only zeros, and 10, which was trained."""
    variables, norms = linen_variables()
    with ocp.CheckpointManager(folder / "runs") as manager:
        for step, tree in ((9, jax.tree.map(jnp.zeros_like, variables)), (10, variables)):
            trees = {item: ocp.args.StandardSave(tree) for item in items}
            manager.save(step, args=ocp.args.Composite(**trees, notes=ocp.args.JsonSave({})))
    return folder / "runs", below("batch_stats/", norms)


def orbax_items(folder):
    path, norms = orbax_manager(folder, ("ema", "state"))
    return path, {**below("ema/", norms), **below("state/", norms)}


def torch_file(folder):
    state, norms = torch_state()
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt", norms


def torch_nested(folder):
    state, norms = torch_state(torch.bfloat16)
    moments = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    torch.save({"epoch": 3, "nets": [state], "optimizer": moments}, folder / "run.ckpt")
    return folder / "run.ckpt", below("nets.0.", norms)


def safetensors_torch(folder):
    state, norms = torch_state(torch.bfloat16)
    safetensors.torch.save_file(state, folder / "weights.safetensors")
    # The file sorts its tensors by name.
    return folder / "weights.safetensors", dict(sorted(norms.items()))


def safetensors_flax(folder):
    state, norms = nnx_state()
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
    name = jax.tree_util.keystr
    arrays = {name(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
    safetensors.numpy.save_file(arrays, folder / "weights.safetensors")
    return folder / "weights.safetensors", norms


FORMATS = (
    *(orbax_linen, orbax_boxed, orbax_nnx, orbax_sharded, orbax_tree, orbax_manager, orbax_items),
    *(torch_file, torch_nested, safetensors_torch, safetensors_flax),
)
# The formats that store the number of batches.
COUNTING = (torch_file, torch_nested, safetensors_torch)


def save_statistics(path, layers):
    """Write a file with the running mean, variance and, optionally, count of each layer."""
    arrays = {}
    for name, (mean, var, *count) in layers.items():
        arrays[f"{name}.running_mean"] = np.asarray(mean, np.float32)
        arrays[f"{name}.running_var"] = np.asarray(var, np.float32)
        arrays |= {f"{name}.num_batches_tracked": np.asarray(n, np.int64) for n in count}
    safetensors.numpy.save_file(arrays, path)
    return path
