"""Shared attention: the attention modules and the functions that attach them to a network."""

from dia_lightning.attention._attach import attach, detach
from dia_lightning.attention._attached_block import is_attached
from dia_lightning.attention._attention_parameters import attention_parameters
from dia_lightning.attention._check import check
from dia_lightning.attention._find import find_sites
from dia_lightning.attention._masks import EAN_MASKS
from dia_lightning.attention._registry import attention_builder, list_attention, register_attention
from dia_lightning.attention._roles import plain_class
from dia_lightning.attention._sites import Branch, LeftOut, Site
from dia_lightning.attention._stages import Stages
from dia_lightning.attention._unit import AttentionUnit
from dia_lightning.attention.attention_condenser import AttentionCondenser
from dia_lightning.attention.cbam import CBAM
from dia_lightning.attention.dia_lstm import DIALSTM
from dia_lightning.attention.dynamic_sharing import DynamicSharingUnit
from dia_lightning.attention.efficient_channel import EfficientChannelAttention
from dia_lightning.attention.spatial_group import SpatialGroupEnhance
from dia_lightning.attention.spatial_pyramid import SpatialPyramidAttention
from dia_lightning.attention.squeeze_excitation import SqueezeExcitation
from dia_lightning.attention.style_recalibration import StyleRecalibration
from dia_lightning.attention.watching import AttentionLayer, attention_layers, watch_maps

__all__ = [
    "CBAM",
    "DIALSTM",
    "EAN_MASKS",
    "AttentionCondenser",
    "AttentionLayer",
    "AttentionUnit",
    "Branch",
    "DynamicSharingUnit",
    "EfficientChannelAttention",
    "LeftOut",
    "Site",
    "SpatialGroupEnhance",
    "SpatialPyramidAttention",
    "SqueezeExcitation",
    "Stages",
    "StyleRecalibration",
    "attach",
    "attention_builder",
    "attention_layers",
    "attention_parameters",
    "check",
    "detach",
    "find_sites",
    "is_attached",
    "list_attention",
    "plain_class",
    "register_attention",
    "watch_maps",
]
