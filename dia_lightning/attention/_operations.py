"""Names of torch's operations, by what they do to their inputs."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Operations with weights, and products of two tensors, by the start of their names.
WEIGHTED = (
    *("conv", "linear", "bilinear", "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"),
    *("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "mm", "addmm", "einsum"),
    *("scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention"),
)
#: Products of two tensors.
PRODUCTS = _names("matmul __matmul__ __rmatmul__ bmm baddbmm einsum")
#: Attention in one operation.
ATTENTION = _names("scaled_dot_product_attention multi_head_attention_forward _native_multi_head_attention")
#: Normalisations that depend on what they normalise, by the start of their names.
DATA_NORMS = ("layer_norm", "group_norm", "instance_norm", "rms_norm")
#: Operations that increase the number of positions, by the start of their names.
UPSAMPLING = ("interpolate", "upsample", "conv_transpose", "pixel_shuffle", "grid_sample")
#: Operations that only move entries.
LAYOUT = _names(
    "view reshape permute transpose transpose_ swapaxes swapdims movedim moveaxis flatten unflatten squeeze unsqueeze "
    "contiguous clone to float half bfloat16 type_as type roll __get__ as_subclass detach view_as reshape_as expand "
    "expand_as"
)
#: Operations that reorder axes; ``.T`` and ``.mT`` are read by ``__get__``.
MOVING = _names("permute movedim moveaxis transpose transpose_ swapaxes swapdims __get__")
#: Operations that only change the sizes of axes.
RESIZING = _names("cat concat chunk split narrow pad interpolate repeat_interleave flip")
DROPOUT = _names("dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout")
MULTIPLIES = _names("mul mul_ __mul__ __rmul__ __imul__ multiply")
SCALE = MULTIPLIES | _names("div div_ __truediv__ true_divide")
SUMS = _names("add add_ __add__ __iadd__ __radd__")
DIFFERENCES = _names("sub sub_ __sub__ __isub__")
#: Activations that commute with a non-negative map.
ACTIVATIONS = _names("relu relu_ leaky_relu leaky_relu_ prelu")
#: Operations that take a part.
NARROWING = _names("__getitem__ chunk split split_with_sizes narrow unbind select tensor_split")
#: Operations that join parts or write into one; ``write`` stands for a write through a view.
JOINING = _names("cat concat write __setitem__")
#: Other operations that a shortcut may contain: linear ones, and maxima over positions.
LINEAR = (
    JOINING
    | DIFFERENCES
    | _names(
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d "
        "max_pool2d max_pool3d boolean_dispatch fn pad _pad stack sum interpolate upsample mean pixel_shuffle "
        "pixel_unshuffle copy_ norm index_select gather _adaptive_max_pool2d neg lerp max amax"
    )
)
#: Operations that depend only on the shape of their input.
CONSTANTS = _names(
    "zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full new_empty "
    "new_tensor"
)
#: Attention with an argument for causality, and the position of that argument.
CAUSAL = {"scaled_dot_product_attention": 5, "multi_head_attention_forward": 24}
#: Operations whose result has its channels second, by the start of their names.
CHANNELS_SECOND = ("conv", "batch_norm", "group_norm", "instance_norm")
#: Operations whose result has its channels last.
CHANNELS_LAST = _names("linear addmm layer_norm rms_norm multi_head_attention_forward _native_multi_head_attention")
