"""The parameters of attached attention."""

from torch import nn

from dia_lightning.attention._attached_block import AttachedBlock, own_names


def attention_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the attention attached to a network, each once, in the order of the network.

    These are the parameters of the units, of the norms added with them, and of modules shared by ``existing="share"``.

    Args:
        model: a network that :func:`attach` was applied to, or any module that contains one, such as a task or a
            network wrapped by ``DistributedDataParallel`` or ``torch.compile``.

    Raises:
        ValueError: if no attention is attached.

    Example:
        >>> from dia_lightning.attention import attach
        >>> from dia_lightning.models import get_model
        >>> network = attach(get_model("cifar_resnet", depth=20, block="basic"), "eca")
        >>> [tuple(parameter.shape) for parameter in attention_parameters(network)]
        [(1, 1, 3), (1, 1, 3), (1, 1, 3)]
    """
    blocks = [module for module in model.modules() if isinstance(module, AttachedBlock)]
    if not blocks:
        raise ValueError("No attention is attached to this network. Call attach(network, ...) first.")
    own = {
        parameter
        for block in blocks
        for name in own_names(block)
        for parameter in block.get_submodule(name).parameters()
    }
    return [parameter for parameter in model.parameters() if parameter in own]
