"""Which layer of the Flax network is which one of the PyTorch network."""

from train_examples.port_efficientnet.flax_model import STAGES

# In the order of the computation. The names in PyTorch count batch norms from 0 in each block.
OF_BLOCK = {
    "expand/conv": "_expand_conv",
    "expand/norm": "_bn0",
    "depthwise/conv": "_depthwise_conv",
    "depthwise/norm": "_bn1",
    "project/conv": "_project_conv",
    "project/norm": "_bn2",
}
BEFORE = {"stem/conv": "_conv_stem", "stem/norm": "_bn0"}
AFTER = {"head/conv": "_conv_head", "head/norm": "_bn1", "classifier": "_fc"}


def names() -> dict[str, str]:
    """Return the name in PyTorch of each layer in Flax that has weights."""
    blocks = [stage for stage in STAGES for _ in range(stage.blocks)]
    result = dict(BEFORE)
    for number, stage in enumerate(blocks):
        for ours, theirs in OF_BLOCK.items():
            if stage.expansion > 1 or not ours.startswith("expand"):
                result[f"block_{number}/{ours}"] = f"_blocks.{number}.{theirs}"
    return result | AFTER


def pairs() -> dict[str, str]:
    """Return the batch norm after each convolution."""
    return {name: name.replace("conv", "norm") for name in names() if name.endswith("conv")}
