"""DeepGEMM as a peer: python benchmarks/speed.py OUT --peer benchmarks/deepgemm_peer.py

Needs the package deep_gemm, built for the machine's torch, and nvcc, with which it compiles a kernel for each shape
when that is first called. Its operands are made ready beforehand: scales in its layout, ragged groups padded to its 128
rows, each group of a ragged weight gradient apart. A ragged product counts the useful rows only, on both sides.
"""

import deep_gemm
import torch
from gemm_bench import cdiv


def scales(scale):
    """(K blocks, M) as DeepGEMM wants it: (M, K blocks), M-major, aligned."""
    return deep_gemm.get_mn_major_tma_aligned_tensor(scale.t().contiguous())


def dense(p, lhs, lhs_scale, rhs, rhs_scale, out):
    a, b = (lhs, scales(lhs_scale)), (rhs.view(p.n, p.k), rhs_scale[0].contiguous())
    d = torch.empty_like(out)
    return {"deepgemm": lambda: deep_gemm.fp8_gemm_nt(a, b, d, disable_ue8m0_cast=True)}


def wgrad(p, lhs, lhs_scale, rhs, rhs_scale, out):
    """It adds to its output; to store, the output is zeroed first."""
    a, b, d = (lhs, scales(lhs_scale)), (rhs, scales(rhs_scale)), torch.zeros_like(out)

    def add():
        deep_gemm.fp8_gemm_nt(a, b, d, c=d, recipe=(1, 1, 128), disable_ue8m0_cast=True)

    def store():
        d.zero_()
        add()

    return {"deepgemm": add} if p.accum else {"deepgemm": add, "deepgemm zeroed": store}


def grouped(p, lhs, lhs_scale, rhs, rhs_scale):
    padded = [cdiv(size, 128) * 128 for size in p.sizes]
    rows = sum(padded)
    data = torch.zeros(rows, p.k, device="cuda", dtype=torch.uint8)
    scale = torch.ones(lhs_scale.shape[0], rows, device="cuda")
    group_of_row = torch.full((rows,), -1, device="cuda", dtype=torch.int32)
    source = target = 0
    for group, size in enumerate(p.sizes):
        data[target : target + size] = lhs.view(torch.uint8)[source : source + size]
        scale[:, target : target + size] = lhs_scale[:, source : source + size]
        group_of_row[target : target + size] = group
        source, target = source + size, target + padded[group]
    a = data.view(lhs.dtype), scales(scale)
    d = torch.empty(rows, p.n, device="cuda", dtype=torch.bfloat16)
    run = deep_gemm.m_grouped_fp8_gemm_nt_contiguous
    return {"deepgemm": lambda: run(a, (rhs, rhs_scale), d, group_of_row, disable_ue8m0_cast=True)}


def masked(p, lhs, lhs_scale, rhs, rhs_scale, sizes):
    scale = lhs_scale.t().contiguous().view(p.groups, p.m, -1)
    a = lhs.view(p.groups, p.m, p.k), deep_gemm.get_mn_major_tma_aligned_tensor(scale)
    d = torch.empty(p.groups, p.m, p.n, device="cuda", dtype=torch.bfloat16)
    expected = cdiv(sum(p.sizes), p.groups)
    run = deep_gemm.m_grouped_fp8_gemm_nt_masked
    return {
        "deepgemm": lambda: run(a, (rhs, rhs_scale), d, sizes, expected, disable_ue8m0_cast=True)
    }


def grouped_wgrad(p, lhs, lhs_scale, rhs, rhs_scale):
    tokens = [cdiv(size, 128) * 128 for size in p.sizes]

    def apart(x):
        parts = x.view(torch.uint8)[:, : sum(tokens)].split(tokens, dim=1)
        return torch.cat([part.contiguous().flatten() for part in parts]).view(x.dtype)

    blocks = sum(tokens) // 128
    a = apart(lhs), scales(lhs_scale[:blocks])
    b = apart(rhs), scales(rhs_scale[:blocks])
    d = torch.zeros(p.groups, p.m, p.n, device="cuda")
    on_device = torch.tensor(tokens, dtype=torch.int32, device="cuda")
    run = deep_gemm.k_grouped_fp8_gemm_nt_contiguous
    return {"deepgemm": lambda: run(a, b, d, tokens, on_device, d)}


def calls(problem, tensors):
    """The same product, by name; of what DeepGEMM does not have, nothing."""
    p, (*operands, sizes, out) = problem, tensors
    if p.shared or (p.accum and p.kind != "1d1d") or (p.kind.startswith("1d") and p.groups > 1):
        return {}
    if p.kind == "1d2d":
        return dense(p, *operands, out)
    if p.kind == "1d1d":
        return wgrad(p, *operands, out) if p.out == "float32" else {}
    if p.kind == "grouped":
        return grouped(p, *operands)
    if p.kind == "masked":
        return masked(p, *operands, sizes)
    return grouped_wgrad(p, *operands) if p.out == "float32" else {}
