"""The custom calls of docs/architecture.md once more, by symbols: what tests hold the handlers to."""

FP8, FLOAT, F32, S32, OUT = "fp8", "float", "f32", "s32", "out"
ALLOWED = {
    FP8: {"f8e4m3fn", "f8e5m2"},
    FLOAT: {"bf16", "f16", "f32"},
    F32: {"f32"},
    S32: {"s32"},
    OUT: {"bf16", "f32"},
}

# target: (operands, results), each "name": (types, axes)
CONTRACT = {
    "quantize_rows": (
        {"x": (FLOAT, "M K")},
        {"data": (FP8, "M K"), "scale": (F32, "M KB")},
    ),
    "quantize_columns": (
        {"x": (FLOAT, "G M K")},
        {"data": (FP8, "G K M"), "scale": (F32, "G K MB")},
    ),
    "quantize_both": (
        {"x": (FLOAT, "G M K")},
        {
            "row_data": (FP8, "G M K"),
            "row_scale": (F32, "G M KB"),
            "column_data": (FP8, "G K M"),
            "column_scale": (F32, "G K MB"),
        },
    ),
    "quantize_blocks": (
        {"x": (FLOAT, "G M K")},
        {"data": (FP8, "G M K"), "scale": (F32, "G MB KB")},
    ),
    "quantize_weight": (
        {"w": (FLOAT, "G K N")},
        {"data_nn": (FP8, "G K N"), "scale": (F32, "G KB NB"), "data_nt": (FP8, "G N K")},
    ),
    "quantize_ragged_columns": (
        {"x": (FLOAT, "M K"), "group_sizes": (S32, "G")},
        {"data": (FP8, "K T"), "scale": (F32, "K TB")},
    ),
    "quantize_ragged_both": (
        {"x": (FLOAT, "M K"), "group_sizes": (S32, "G")},
        {
            "row_data": (FP8, "M K"),
            "row_scale": (F32, "M KB"),
            "column_data": (FP8, "K T"),
            "column_scale": (F32, "K TB"),
        },
    ),
    "activation_rows": (
        {"x": (FLOAT, "M A F")},
        {"data": (FP8, "M F"), "scale": (F32, "M FB")},
    ),
    "activation_both": (
        {"x": (FLOAT, "G M A F")},
        {
            "row_data": (FP8, "G M F"),
            "row_scale": (F32, "G M FB"),
            "column_data": (FP8, "G F M"),
            "column_scale": (F32, "G F MB"),
        },
    ),
    "activation_grad_both": (
        {"x": (FLOAT, "G M A F"), "dy": (FLOAT, "G M F")},
        {
            "row_data": (FP8, "G M A F"),
            "row_scale": (F32, "G M A FB"),
            "column_data": (FP8, "G A F M"),
            "column_scale": (F32, "G A F MB"),
        },
    ),
    "activation_ragged_both": (
        {"x": (FLOAT, "M A F"), "group_sizes": (S32, "G")},
        {
            "row_data": (FP8, "M F"),
            "row_scale": (F32, "M FB"),
            "column_data": (FP8, "F T"),
            "column_scale": (F32, "F TB"),
        },
    ),
    "activation_ragged_grad_both": (
        {"x": (FLOAT, "M A F"), "dy": (FLOAT, "M F"), "group_sizes": (S32, "G")},
        {
            "row_data": (FP8, "M A F"),
            "row_scale": (F32, "M A FB"),
            "column_data": (FP8, "A F T"),
            "column_scale": (F32, "A F TB"),
        },
    ),
    "activation_weighted_rows": (
        {"x": (OUT, "M A F"), "weight": (F32, "M")},
        {"data": (FP8, "M F"), "scale": (F32, "M FB")},
    ),
    "activation_ragged_weighted_both": (
        {"x": (OUT, "M A F"), "weight": (F32, "M"), "group_sizes": (S32, "G")},
        {
            "row_data": (FP8, "M F"),
            "row_scale": (F32, "M FB"),
            "column_data": (FP8, "F T"),
            "column_scale": (F32, "F TB"),
        },
    ),
    "activation_ragged_weighted_grad_both": (
        {
            "x": (OUT, "M A F"),
            "dy": (OUT, "M F"),
            "weight": (F32, "M"),
            "group_sizes": (S32, "G"),
        },
        {
            "row_data": (FP8, "M A F"),
            "row_scale": (F32, "M A FB"),
            "column_data": (FP8, "A F T"),
            "column_scale": (F32, "A F TB"),
            "weight_grad": (F32, "M FB"),
        },
    ),
    "gather_quantize_rows": (
        {"x": (FLOAT, "S K"), "source": (S32, "M")},
        {"data": (FP8, "M K"), "scale": (F32, "M KB")},
    ),
    "gather_quantize_both": (
        {"x": (FLOAT, "S K"), "source": (S32, "M"), "group_sizes": (S32, "G")},
        {
            "row_data": (FP8, "M K"),
            "row_scale": (F32, "M KB"),
            "column_data": (FP8, "K T"),
            "column_scale": (F32, "K TB"),
        },
    ),
    "gather_rows": (
        {"x": (FP8, "S K"), "x_scale": (F32, "S KB"), "source": (S32, "M")},
        {"data": (FP8, "M K"), "scale": (F32, "M KB")},
    ),
    "gather_requantize_both": (
        {
            "x": (FP8, "S K"),
            "x_scale": (F32, "S KB"),
            "source": (S32, "M"),
            "group_sizes": (S32, "G"),
        },
        {
            "row_data": (FP8, "M K"),
            "row_scale": (F32, "M KB"),
            "column_data": (FP8, "K T"),
            "column_scale": (F32, "K TB"),
        },
    ),
    "sum_rows": (
        {"rows": (OUT, "M K"), "position": (S32, "S J")},
        {"out": (OUT, "S K")},
    ),
    "sum_weighted_rows": (
        {"rows": (OUT, "M K"), "position": (S32, "S J"), "weight": (F32, "S J")},
        {"out": (OUT, "S K")},
    ),
    "gemm_1d2d": (
        {
            "lhs": (FP8, "G M K"),
            "lhs_scale": (F32, "G M KB"),
            "rhs": (FP8, "G N K"),
            "rhs_scale": (F32, "G NB KB"),
        },
        {"out": (OUT, "G M N")},
    ),
    "gemm_1d1d": (
        {
            "lhs": (FP8, "G M K"),
            "lhs_scale": (F32, "G M KB"),
            "rhs": (FP8, "G N K"),
            "rhs_scale": (F32, "G N KB"),
        },
        {"out": (OUT, "G M N")},
    ),
    "grouped_gemm": (
        {
            "lhs": (FP8, "M K"),
            "lhs_scale": (F32, "M KB"),
            "rhs": (FP8, "G N K"),
            "rhs_scale": (F32, "G NB KB"),
            "group_sizes": (S32, "G"),
        },
        {"out": (OUT, "M N")},
    ),
    "masked_grouped_gemm": (
        {
            "lhs": (FP8, "G M K"),
            "lhs_scale": (F32, "G M KB"),
            "rhs": (FP8, "G N K"),
            "rhs_scale": (F32, "G NB KB"),
            "masked_m": (S32, "G"),
        },
        {"out": (OUT, "G M N")},
    ),
    "grouped_wgrad_gemm": (
        {
            "lhs": (FP8, "N T"),
            "lhs_scale": (F32, "N TB"),
            "rhs": (FP8, "K T"),
            "rhs_scale": (F32, "K TB"),
            "group_sizes": (S32, "G"),
        },
        {"out": (OUT, "G N K")},
    ),
}


def quantizes(name):
    """Whether a target makes scales, and so has the attribute pow2; `name` without version."""
    return name.startswith(("quantize", "activation", "gather")) and name != "gather_rows"


def pads_tokens(name):
    """Whether a target's results lie over the group-padded token axis: T follows from M and G."""
    return "gemm" not in name and "group_sizes" in CONTRACT[name][0]
