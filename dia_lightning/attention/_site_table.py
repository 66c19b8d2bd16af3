"""Where the residual branches of known networks end.

The sites of the four CIFAR families are those of the DIANet authors; ResNets for larger images follow from them. All
other entries, above all those of transformers and U-Nets, are this package's own reading of "the end of the branch".
"""

from typing import Any

from dia_lightning.attention._sites import BlockRule, Site


def _attention_and_mlp(attention: str, mlp: str, *, before: bool = False) -> tuple[Site, ...]:
    return (
        Site(attention, before=before, channels_last=True, branch="attention"),
        Site(mlp, before=before, channels_last=True, branch="mlp"),
    )


def _before_drop_path(block: Any) -> tuple[Site, ...]:
    return (Site("drop_path", before=True),) if block.has_skip else ()


def _before_stochastic_depth(block: Any) -> tuple[Site, ...]:
    return (Site("stochastic_depth", before=True),) if block.use_res_connect else ()


def _mobilenet_v2(block: Any) -> tuple[Site, ...]:
    return (Site(f"conv.{len(block.conv) - 1}"),) if block.use_res_connect else ()


def _mobilenet_v3(block: Any) -> tuple[Site, ...]:
    return (Site(f"block.{len(block.block) - 1}.1"),) if block.use_res_connect else ()


def _timm_resnet(norm: str) -> Any:
    """A block that has an attention module of its own keeps it; ours comes after it."""

    def sites(block: Any) -> tuple[Site, ...]:
        return (Site(norm if block.se is None else "se"),)

    return sites


def _timm_convnext(block: Any) -> tuple[Site, ...]:
    # Before the layer scale, after which the features of an untrained network are nearly zero.
    return (Site("mlp", channels_last=not block.use_conv_mlp),)


def _diffusers_attention(block: Any) -> tuple[Site, ...]:
    if not block.residual_connection:
        return ()
    return (Site("to_out.1", channels_last=True, branch="attention", optional=True),)


# Transformer blocks are optional, because in a U-Net they come with residual blocks; in a DiT they are all there is.
def _diffusers_transformer(block: Any) -> tuple[Site, ...]:
    attentions = [name for name in ("attn1", "attn2") if getattr(block, name, None) is not None]
    return (
        *(Site(name, channels_last=True, branch="attention", optional=True) for name in attentions),
        Site("ff", channels_last=True, branch="mlp", optional=True),
    )


#: Qualified name of a block class -> its rule. Names instead of classes, so that nothing is imported for it.
BLOCK_RULES = {
    # this package
    "dia_lightning.models.cifar_resnet.BasicBlock": BlockRule((Site("bn2"),), width="conv2"),  # norms may be left out
    "dia_lightning.models.cifar_resnet.Bottleneck": BlockRule((Site("bn3"),), width="conv3"),
    "dia_lightning.models.cifar_preresnet.BasicBlock": BlockRule((Site("conv2"),), branch_norm=True),
    "dia_lightning.models.cifar_preresnet.Bottleneck": BlockRule((Site("conv3"),), branch_norm=True),
    "dia_lightning.models.cifar_wrn.BasicBlock": BlockRule((Site("conv2"),), branch_norm=True, zero_bias=True),
    "dia_lightning.models.cifar_resnext.Bottleneck": BlockRule((Site("bn3"),), zero_bias=True),
    # torchvision
    "torchvision.models.resnet.BasicBlock": BlockRule((Site("bn2"),)),
    "torchvision.models.resnet.Bottleneck": BlockRule((Site("bn3"),)),
    "torchvision.models.regnet.ResBottleneckBlock": BlockRule((Site("f.c.1"),)),
    "torchvision.models.convnext.CNBlock": BlockRule((Site("block.5", channels_last=True),)),
    "torchvision.models.efficientnet.MBConv": BlockRule(_before_stochastic_depth, width=""),
    "torchvision.models.efficientnet.FusedMBConv": BlockRule(_before_stochastic_depth, width=""),
    "torchvision.models.mobilenetv2.InvertedResidual": BlockRule(_mobilenet_v2),
    "torchvision.models.mobilenetv3.InvertedResidual": BlockRule(_mobilenet_v3),
    "torchvision.models.vision_transformer.EncoderBlock": BlockRule(
        _attention_and_mlp("dropout", "mlp.4"), width="ln_1"
    ),
    "torchvision.models.swin_transformer.SwinTransformerBlock": BlockRule(
        _attention_and_mlp("attn", "mlp"), width="norm1"
    ),
    "torchvision.models.swin_transformer.SwinTransformerBlockV2": BlockRule(_attention_and_mlp("norm1", "norm2")),
    # timm
    "timm.models.resnet.BasicBlock": BlockRule(_timm_resnet("bn2"), width="bn2"),
    "timm.models.resnet.Bottleneck": BlockRule(_timm_resnet("bn3"), width="bn3"),
    "timm.models.convnext.ConvNeXtBlock": BlockRule(_timm_convnext, width="norm"),
    "timm.models._efficientnet_blocks.ConvBnAct": BlockRule(_before_drop_path, width="conv"),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": BlockRule(_before_drop_path, width="conv_pw"),
    "timm.models._efficientnet_blocks.InvertedResidual": BlockRule(_before_drop_path, width="conv_pwl"),
    "timm.models._efficientnet_blocks.EdgeResidual": BlockRule(_before_drop_path, width="conv_pwl"),
    "timm.models._efficientnet_blocks.UniversalInvertedResidual": BlockRule(_before_drop_path, width="pw_proj.conv"),
    "timm.models.vision_transformer.Block": BlockRule(_attention_and_mlp("attn", "mlp"), width="norm1"),
    "timm.models.swin_transformer.SwinTransformerBlock": BlockRule(
        _attention_and_mlp("drop_path1", "drop_path2", before=True), width="norm1"
    ),
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": BlockRule(
        _attention_and_mlp("drop_path1", "drop_path2", before=True), width="norm1"
    ),
    # diffusers
    "diffusers.models.resnet.ResnetBlock2D": BlockRule((Site("conv2"),)),
    "diffusers.models.attention_processor.Attention": BlockRule(_diffusers_attention, width="to_out.0"),
    "diffusers.models.attention.BasicTransformerBlock": BlockRule(_diffusers_transformer, width="ff.net.2"),
}
