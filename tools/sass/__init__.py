"""Static performance audit of Hopper (sm_90a) wgmma GEMM kernels, from machine code alone.

    python -m tools.sass FILE [--kernel REGEX] [--json] [--assert EXPR ...]

FILE is a cubin, fatbin, object file or shared library. For each kernel the report gives its resources, its
instruction mix and, for each innermost loop that issues QGMMA/HGMMA, the instructions spent per k-block and two
modelled upper bounds on tensor-core utilisation. Nothing is run: these are proxies that catch spills, stray
address arithmetic, serialised wgmma and lost overlap; they are no timings and must never be reported as such.

Needs `nvdisasm` (and `cuobjdump` for anything but a bare cubin) on PATH, beside nvcc, in --tools DIR, or in the
pip packages nvidia-cuda-nvdisasm / nvidia-cuda-cuobjdump (site-packages/nvidia/cu13/bin) of this interpreter.
Exit status: 0 fine; 1 an --assert failed; 2 bad usage, unreadable file, no disassembler, no kernel.

How a loop is measured
----------------------
- Loops are natural loops of the control-flow graph (back edges to a dominator), not address ranges: the compiler
  moves the retry code of mbarrier waits out of line, and the branches back from there look like huge loops.
- Hot path: of all paths from the loop header to a back edge, the one with the most MMA instructions, then the
  fewest instructions. A nested loop without MMA (a spin on an mbarrier) counts once: every wait succeeds at first
  try. The rest of the loop is reported as `off_path`. So instruction counts are lower bounds.
- k-block (the unit of all "per k-block" figures) = 128 bytes of K of one 64-row wave of one warpgroup = 4 QGMMA
  m64nNk32 (or 4 HGMMA m64nNk16): MMA instructions / 4. In the DeepGEMM style that is one commit group. A loop
  unrolled 8 times holds 8; a tile of 256 rows over two warpgroups runs 2 waves per 128-deep K step, so twice that.
- Main loops = the loops with most k-blocks per iteration (there may be several, one per specialised variant). The
  others are remainder loops. An assertion on a loop figure must hold in every main loop.
- Ideal promotion per k-block and thread: 64*N/128 FFMA (one for each accumulator register) plus the scale products.
  `block` promotion (a scale for each A row, one for each 128 B columns): 2 FMUL, or 4 if 128 % N != 0, since such
  a tile meets two B scales. `outer` promotion (a scale for each A row and each B column): one product for each
  accumulator, 64*N/128 FMUL. A loop is `outer` if it holds at least N/4 FMUL per k-block, and `no` with an ideal of 0
  if it holds no FFMA, FMUL or FADD (plain GEMM).
- overhead = instructions - MMA - ideal promotion: what a perfect kernel would not issue, barriers and loads included.
- exposed = instructions issued while the warp has no MMA in flight, from the WARPGROUP.DEPBAR that waits for the last
  one to the next MMA, followed around the loop to the steady state. `exposed_issue` counts them, `exposed_stall` adds
  up their encoded stall cycles, both per k-block. `overlapped_promotion` is the share of FFMA/FMUL/FADD issued while
  an MMA of the same warp is in flight (near 0 for kernels that wait at once after each commit).

The model (each term optimistic, so each utilisation is an upper bound)
----------------------------------------------------------------------
All terms are cycles per k-block, W the number of math warpgroups (launch bound / 128 - 1 for one producer warpgroup,
2 without a launch bound, or --math-warpgroups).
  T   tensor cores: 64*N*128 bytes of K / 4096 = 2*N, whatever the data type. From the H100 SXM data sheet: 1979
      TFLOP/s dense FP8 on 132 SMs is 4096 MAC per cycle and SM at 1.83 GHz; 16-bit types have half the rate, and
      half the K in the same bytes.
  S   shared memory: (64 rows of A unless A is in registers, + N rows of B) * 128 B, at 32 banks * 4 B per cycle
      (CUDA programming guide). Fills by TMA and reads by other instructions are not charged.
  I   issue slots. An SM has 4 sub-partitions, each with a scheduler that issues one warp instruction per cycle and 32
      FP32 lanes, so that an FFMA takes one cycle (Hopper architecture white paper). A warpgroup puts one warp on
      each, so W warpgroups share every scheduler. The producer warp is not charged.
  E   exposed: max(exposed_issue, exposed_stall).   H   hidden: the same of the other instructions but the MMA.
  util_overlap = W*T / max(W*T, W*S, W*I, max(T, H) + E): the warpgroups are out of phase, so that one promotes under
      the MMA of the other.
  util_serial = W*T / (max(W*T, W*S, W*(I - exposed_issue), H) + max(W*exposed_issue, E)): the warpgroups are in phase,
      so that promotion hides only under the MMA of its own warp.
  slack_cycles = W*T - (max(T, H) + E): latency outside this model that each k-block of a warpgroup can bear before the
      tensor cores wait even in the overlapped case. With W = 1 it is negative, for there is nothing to overlap with.
Left out: latencies (mbarrier, shared memory, scoreboard waits, of which `exposed_waits` counts the exposed ones; start
and drain of an MMA), memory traffic, tails, epilogue, wave quantisation, instruction-cache misses, and clocks lowered
by power. Real kernels lie between the two bounds or below both.

Encoded scheduling fields (stall cycles, yield hint, wait mask) are undocumented by NVIDIA; their layout is that found
by Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", arXiv 1804.06826, and sm_90 code
still reads sensibly with it. `ffma_yield` is the share of FFMA that hint a switch to another warp (DeepGEMM's authors
saw up to 10% from alternating it; compilers since CUDA 12.3 do so). `ffma_same_bank` counts the FFMA per k-block that
fetch three different registers from one of two banks, even and odd: a lost cycle on Volta, unproven on Hopper.

Assertions
----------
  --assert 'spills==0' 'overhead_per_kblock<=40' 'count.R2UR<100' 'loop.uniform<=25' 'util_serial>=0.7'
NAME OP NUMBER with OP one of == != <= >= < >. Kernel figures: registers, stack, spills (LDL+STL, static),
spills.PLACE (k_loop, tile_loop, producer_loop, elsewhere), smem_static, barriers, code_bytes, mma_outside_loops,
count.OPCODE. Main-loop figures: the fields that --json shows under loops[], and loop.CLASS (instructions of a class per
k-block). Every selected kernel must pass. Kernels without MMA loop are exempt from main-loop figures, but a figure that
no selected kernel has is a failure. Worth asserting in any kernel: spills.k_loop==0, commit_groups_per_kblock<=1 (ptxas
serialises wgmma with no more than a warning), kblocks_per_iteration>=1.
"""
