"""The parts of a layer that memory bandwidth limits: residual addition with RMSNorm, RoPE, SwiGLU.

    add + RMSNorm   s = x + branch,  rstd = (mean(s²) + eps)^−½,  n = s·rstd,  y = n·w
                    dn = dy·w,  ds = g + rstd·(dn − n·mean(dn·n)),  dw = Σ_rows dy·n,
                    dx = dbranch = ds, with g the gradient of s from its other uses
    RoPE            y₁ = x₁·cos − x₂·sin,  y₂ = x₂·cos + x₁·sin
                    The gradient is a rotation by the opposite angle: the same with −sin.
    SwiGLU          y = silu(gate)·up = gate·σ(gate)·up
                    dup = dy·gate·σ(gate),  dgate = dy·up·σ(gate)·(1 + gate·(1 − σ(gate)))

Bytes per element, with x in float32 and the rest in bf16 (training under autocast):

                    forward               backward
    add + RMSNorm   6 read, 6 written     10 read, 6 written
    RoPE            2 read, 2 written      2 read, 2 written
    SwiGLU          4 read, 2 written      6 read, 4 written

Kernels compute in float32, whatever the dtypes in memory. The order of this file: the PyTorch
references; the kernels, the simplest first; the autograd functions that launch them.
"""

import torch
import torch.nn.functional as F

from .common import (
    as_rows,
    ceil_div,
    empty_contiguous,
    next_power_of_2,
    row_stride,
    tl,
    triton,
    upcast,
)

# ---- PyTorch references --------------------------------------------------------------------------


def add_rms_norm(x, branch, weight, eps):
    """Return s = x + branch and its RMSNorm y = weight·s / sqrt(mean(s²) + eps), both (..., D).

    x is the residual stream, and branch is what attention or the MLP adds to it (None: nothing).
    s/rms is rounded to s's dtype before the product with weight, as in the published LLaMA.
    """
    s = x if branch is None else x + branch
    s32 = upcast(s)
    rstd = torch.rsqrt(s32.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
    return s, (s32 * rstd).to(s.dtype) * weight


def add_rms_norm_backward(g, dy, s, weight, eps):
    """Return (ds, dw) from g and dy, the gradients of s and y. ds is that of x and of branch."""
    rstd = torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + eps)
    n = s * rstd

    # But for eps, the length of n is fixed: the part of dn along n changes nothing and is removed.
    dn = dy * weight
    ds = g + rstd * (dn - n * (dn * n).mean(-1, keepdim=True))
    dw = (dy * n).flatten(0, -2).sum(0)
    return ds, dw


def rotate(x, cos, sin):
    """RoPE: rotate each pair (x_i, x_{i+H}) of a head by the i-th angle of its position.

    x (B, nh, T, 2H); cos and sin of the angles (B, 1, T, H).
    """
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def swiglu(gate, up):
    """Return silu(gate)·up."""
    return F.silu(gate) * up


def swiglu_backward(dy, gate, up):
    """Return (dgate, dup)."""
    sigmoid = torch.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dy * gate * sigmoid
    return dgate, dup


# ---- kernels: SwiGLU -----------------------------------------------------------------------------


@triton.jit
def swiglu_forward_kernel(
    gate_ptr, up_ptr, y_ptr,
    gate_row_stride, up_row_stride,
    n_rows, n_cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """y = silu(gate)·up. One program computes one tile of BLOCK_ROWS × BLOCK_COLS elements."""
    # Which rows and which columns are this program's? int64, because offsets can exceed 2³¹.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_ids = rows[:, None]  # (BLOCK_ROWS, 1)
    col_ids = cols[None, :]  # (1, BLOCK_COLS)

    # The last tiles stick out of the matrix: there, loads give 0 and stores write nothing.
    mask = (row_ids < n_rows) & (col_ids < n_cols)  # (BLOCK_ROWS, BLOCK_COLS)

    # Read each input once. The rows of gate and up may be slices of wider rows.
    gate_ptrs = gate_ptr + row_ids * gate_row_stride + col_ids
    gate = tl.load(gate_ptrs, mask, other=0.0).to(tl.float32)
    up_ptrs = up_ptr + row_ids * up_row_stride + col_ids
    up = tl.load(up_ptrs, mask, other=0.0).to(tl.float32)

    # silu(gate) stays in registers. y is contiguous; the store rounds to its dtype.
    silu = gate * tl.sigmoid(gate)
    y_ptrs = y_ptr + row_ids * n_cols + col_ids
    tl.store(y_ptrs, silu * up, mask)


@triton.jit
def swiglu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    dy_row_stride, gate_row_stride, up_row_stride, out_row_stride,
    n_rows, n_cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dgate and dup of one tile. Computing σ(gate) again is cheaper than storing and reading it."""
    # The program's tile, as in the forward kernel
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_ids = rows[:, None]  # (BLOCK_ROWS, 1)
    col_ids = cols[None, :]  # (1, BLOCK_COLS)
    mask = (row_ids < n_rows) & (col_ids < n_cols)  # (BLOCK_ROWS, BLOCK_COLS)

    # Three inputs, each read once, at row strides of their own
    dy_ptrs = dy_ptr + row_ids * dy_row_stride + col_ids
    dy = tl.load(dy_ptrs, mask, other=0.0).to(tl.float32)
    gate_ptrs = gate_ptr + row_ids * gate_row_stride + col_ids
    gate = tl.load(gate_ptrs, mask, other=0.0).to(tl.float32)
    up_ptrs = up_ptr + row_ids * up_row_stride + col_ids
    up = tl.load(up_ptrs, mask, other=0.0).to(tl.float32)

    # silu′(gate) = σ·(1 + gate·(1 − σ)). Both gradients are halves of rows.
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dgate_ptr + row_ids * out_row_stride + col_ids, dgate, mask)
    dup = dy * gate * sigmoid
    tl.store(dup_ptr + row_ids * out_row_stride + col_ids, dup, mask)


# ---- kernels: RoPE -------------------------------------------------------------------------------


@triton.jit
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr,
    x_batch_stride, x_head_stride, x_time_stride,
    T, n_head, n_rows, sign,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Rotate x (B, n_head, T, 2H) by its angles, or by their opposites where sign is −1.

    A row is one head at one position, in the order of y, whose memory is (B, T, n_head, 2H). One
    program rotates BLOCK_ROWS of the n_rows = B·T·n_head rows.
    """
    # One tile holds whole half-heads: BLOCK_H is at least H.
    row_ids = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_ids = tl.arange(0, BLOCK_H)
    mask = (row_ids < n_rows)[:, None] & (col_ids < H)[None, :]  # (BLOCK_ROWS, BLOCK_H)

    # All heads at a position share its angles. cos and sin are (B·T, H).
    position = row_ids // n_head  # b·T + t
    cos_ptrs = cos_ptr + position[:, None] * H + col_ids[None, :]
    sin_ptrs = sin_ptr + position[:, None] * H + col_ids[None, :]
    cos = tl.load(cos_ptrs, mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptrs, mask, other=0.0).to(tl.float32) * sign

    # Both halves of each head. x is a view of a projection, read at its strides without a copy.
    batch_offsets = position // T * x_batch_stride
    time_offsets = position % T * x_time_stride
    head_offsets = row_ids % n_head * x_head_stride
    x_row_offsets = batch_offsets + time_offsets + head_offsets
    x_ptrs = x_ptr + x_row_offsets[:, None] + col_ids[None, :]
    x1 = tl.load(x_ptrs, mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptrs + H, mask, other=0.0).to(tl.float32)

    # The formula of both directions: sin has its sign already. y is contiguous, row after row.
    y_ptrs = y_ptr + row_ids[:, None] * (2 * H) + col_ids[None, :]
    tl.store(y_ptrs, x1 * cos - x2 * sin, mask)
    tl.store(y_ptrs + H, x2 * cos + x1 * sin, mask)


# ---- kernels: residual addition with RMSNorm -----------------------------------------------------


@triton.jit
def add_rms_norm_forward_kernel(
    x_ptr, branch_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr,
    x_row_stride, branch_row_stride,
    n_rows, n_cols, eps,
    HAS_BRANCH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One program normalizes BLOCK_ROWS whole rows: BLOCK_COLS is at least n_cols.

    sum, y and rstd are contiguous. Without a branch, sum is x itself and is not written.
    """
    # A tile holds whole rows, so the sum of squares needs no second pass.
    row_ids = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_ids = tl.arange(0, BLOCK_COLS)
    row_mask = row_ids < n_rows
    col_mask = col_ids < n_cols
    mask = row_mask[:, None] & col_mask[None, :]  # (BLOCK_ROWS, BLOCK_COLS)

    # s = x + branch, rounded to the dtype in which it is kept
    x_ptrs = x_ptr + row_ids[:, None] * x_row_stride + col_ids[None, :]
    s = tl.load(x_ptrs, mask, other=0.0)
    if HAS_BRANCH:
        branch_ptrs = branch_ptr + row_ids[:, None] * branch_row_stride + col_ids[None, :]
        branch = tl.load(branch_ptrs, mask, other=0.0).to(tl.float32)
        s = (s.to(tl.float32) + branch).to(sum_ptr.dtype.element_ty)
        sum_ptrs = sum_ptr + row_ids[:, None] * n_cols + col_ids[None, :]
        tl.store(sum_ptrs, s, mask)

    # Columns that do not exist hold 0 and add nothing to the sum of squares.
    s = s.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(s * s, 1) / n_cols + eps)  # (BLOCK_ROWS,)

    # As in the reference, n is rounded to the dtype of s before the product with weight.
    n = (s * rstd[:, None]).to(sum_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + col_ids, col_mask, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + row_ids[:, None] * n_cols + col_ids[None, :]
    tl.store(y_ptrs, n * weight[None, :], mask)

    # The backward pass needs only the row's statistic: it computes n again.
    tl.store(rstd_ptr + row_ids, rstd, row_mask)


@triton.jit
def add_rms_norm_backward_kernel(
    g_ptr, dy_ptr, sum_ptr, weight_ptr, rstd_ptr, ds_ptr, dbranch_ptr, partial_dw_ptr,
    g_row_stride, dy_row_stride, sum_row_stride,
    n_rows, n_cols,
    HAS_G: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One program computes ds of every num_programs-th block of rows, and the sum of their dw.

    It leaves that sum in its own row of partial_dw (num_programs, n_cols). No two programs add to
    the same address, so every run gives the same bits.
    """
    # The weight is read once and dw is kept in registers, over all of the program's blocks.
    col_ids = tl.arange(0, BLOCK_COLS)
    col_mask = col_ids < n_cols
    weight = tl.load(weight_ptr + col_ids, col_mask, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_COLS], tl.float32)

    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        # tl.full: under the interpreter a loop index is a Python int, which has no .to(tl.int64)
        row_ids = tl.full([], block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row_mask = row_ids < n_rows
        mask = row_mask[:, None] & col_mask[None, :]  # (BLOCK_ROWS, BLOCK_COLS)

        # n = s·rstd again, from what the forward pass saved
        rstd = tl.load(rstd_ptr + row_ids, row_mask, other=0.0)[:, None]  # (BLOCK_ROWS, 1)
        sum_ptrs = sum_ptr + row_ids[:, None] * sum_row_stride + col_ids[None, :]
        n = tl.load(sum_ptrs, mask, other=0.0).to(tl.float32) * rstd

        # ds = g + rstd·(dn − n·mean(dn·n)). g is missing where the sum itself is not used.
        dy_ptrs = dy_ptr + row_ids[:, None] * dy_row_stride + col_ids[None, :]
        dy = tl.load(dy_ptrs, mask, other=0.0).to(tl.float32)
        dn = dy * weight[None, :]
        mean = tl.sum(dn * n, 1) / n_cols  # (BLOCK_ROWS,)
        ds = rstd * (dn - n * mean[:, None])
        if HAS_G:
            g_ptrs = g_ptr + row_ids[:, None] * g_row_stride + col_ids[None, :]
            ds += tl.load(g_ptrs, mask, other=0.0).to(tl.float32)

        # The branch has the same gradient. Only another dtype needs memory of its own.
        offsets = row_ids[:, None] * n_cols + col_ids[None, :]
        tl.store(ds_ptr + offsets, ds, mask)
        if dbranch_ptr is not None:
            tl.store(dbranch_ptr + offsets, ds, mask)

        # Rows that do not exist have dy = 0 and add nothing.
        dw += tl.sum(dy * n, 0)

    tl.store(partial_dw_ptr + tl.program_id(0) * n_cols + col_ids, dw, col_mask)


# ---- launches, under autograd --------------------------------------------------------------------

PROGRAMS = 264  # of RMSNorm's backward pass, at most: two for each of a large GPU's 132 processors
BLOCK = 1024  # elements of a tile


def whole_row_blocks(n_cols):
    """Return tile sizes for a kernel that sums over a row: one whole row, or several short ones."""
    block_cols = next_power_of_2(n_cols)

    # A warp is 32 threads: up to 8,192 columns, a thread holds at most 32 elements of a tile.
    return {
        "BLOCK_ROWS": max(1, BLOCK // block_cols),
        "BLOCK_COLS": block_cols,
        "num_warps": 4 if block_cols <= 4096 else 8,
    }


def elementwise_blocks(n_cols):
    """Return tile sizes for an elementwise kernel: part of a row, or several short rows."""
    block_cols = min(BLOCK, next_power_of_2(n_cols))
    return {"BLOCK_ROWS": BLOCK // block_cols, "BLOCK_COLS": block_cols}


class AddRMSNorm(torch.autograd.Function):
    """x, branch (rows, D), weight (D,) -> s = x + branch in x's dtype and its RMSNorm y in `dtype`.

    Without a branch, s is x itself, and None is returned in its place.

    weight may also be (programs, D), expanded from one row. Then as many programs run backward, and
    row i of its gradient is the share of program i: autograd adds up the shares of many calls, and
    they are summed over the programs once.
    """

    @staticmethod
    def forward(ctx, x, branch, weight, eps, dtype):
        n_rows, n_cols = x.shape

        # With nothing to add, s is x, and the kernel does not write it.
        s = x if branch is None else empty_contiguous(x)
        y = x.new_empty(n_rows, n_cols, dtype=dtype)
        rstd = x.new_empty(n_rows, dtype=torch.float32)

        # One program for each block of rows
        blocks = whole_row_blocks(n_cols)
        grid = (ceil_div(n_rows, blocks["BLOCK_ROWS"]),)
        add_rms_norm_forward_kernel[grid](
            x, branch, weight, s, y, rstd,
            row_stride(x), row_stride(branch),
            n_rows, n_cols, eps,
            HAS_BRANCH=branch is not None, **blocks,
        )  # fmt: skip

        ctx.save_for_backward(s, weight, rstd)
        ctx.branch_dtype = None if branch is None else branch.dtype

        # A result that the loss does not use has gradient None, not zeros that must be read.
        ctx.set_materialize_grads(False)
        return (None if branch is None else s), y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, dy):
        s, weight, rstd = ctx.saved_tensors
        n_rows, n_cols = s.shape

        # The loss uses the sum and not its norm: the gradient passes through.
        if dy is None:
            dbranch = None if ctx.branch_dtype is None else g.to(ctx.branch_dtype)
            return g, dbranch, None, None, None

        # The programs share the blocks of rows, so that there are few rows of partial_dw to add up.
        dy = as_rows(dy)
        g = None if g is None else as_rows(g)
        blocks = whole_row_blocks(n_cols)
        has_shares = weight.dim() == 2
        n_block = ceil_div(n_rows, blocks["BLOCK_ROWS"])
        programs = len(weight) if has_shares else min(PROGRAMS, n_block)

        # x and branch have the same gradient, each in its own dtype.
        ds = empty_contiguous(s)
        dbranch = None if ctx.branch_dtype is None else ds
        if ctx.branch_dtype not in (None, s.dtype):
            dbranch = ds.new_empty(ds.shape, dtype=ctx.branch_dtype)
        partial_dw = s.new_empty(programs, n_cols, dtype=torch.float32)
        add_rms_norm_backward_kernel[(programs,)](
            g, dy, s, weight, rstd, ds, None if dbranch is ds else dbranch, partial_dw,
            row_stride(g), row_stride(dy), row_stride(s),
            n_rows, n_cols,
            HAS_G=g is not None, **blocks,
        )  # fmt: skip

        dweight = (partial_dw if has_shares else partial_dw.sum(0)).to(weight.dtype)
        return ds, dbranch, dweight, None, None


def run_rotate(x, cos, sin, sign):
    """Rotate x (B, nh, T, hd) by its angles (sign 1), or back (sign −1).

    x may have any strides; only its last dimension has to be contiguous, and is made so. The result
    has the shape of x and lies in memory as (B, T, nh, hd), like the result of a projection. So the
    gradient of x goes back to the projection's (B, T, nh·hd) without a copy.
    """
    B, n_head, T, head_dim = x.shape
    # The kernel reads them as (B·T, H), without broadcasting.
    assert cos.shape == sin.shape == (B, 1, T, head_dim // 2)
    assert cos.is_contiguous() and sin.is_contiguous()
    if x.stride(3) != 1:
        x = x.contiguous()
    y = x.new_empty(B, T, n_head, head_dim)

    # A row of the kernel is one head at one position.
    H = head_dim // 2
    n_rows = B * T * n_head
    block_h = next_power_of_2(H)
    block_rows = max(1, BLOCK // block_h)
    rotate_kernel[(ceil_div(n_rows, block_rows),)](
        x, cos, sin, y,
        *x.stride()[:3],
        T, n_head, n_rows, sign,
        H=H, BLOCK_H=block_h, BLOCK_ROWS=block_rows,
    )  # fmt: skip
    return y.transpose(1, 2)  # (B, nh, T, hd)


class Rotate(torch.autograd.Function):
    """RoPE of x (B, nh, T, 2H) with cos and sin (B, 1, T, H), contiguous; these get no gradient."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return run_rotate(x, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors

        # The gradient of a rotation is rotated by the opposite angles.
        return run_rotate(dy, cos, sin, -1.0), None, None


class SwiGLU(torch.autograd.Function):
    """gate, up (rows, D), contiguous within a row -> silu(gate)·up (rows, D)."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        n_rows, n_cols = gate.shape
        y = empty_contiguous(gate)

        # One program for each tile
        blocks = elementwise_blocks(n_cols)
        row_tiles = ceil_div(n_rows, blocks["BLOCK_ROWS"])
        col_tiles = ceil_div(n_cols, blocks["BLOCK_COLS"])
        swiglu_forward_kernel[(row_tiles, col_tiles)](
            gate, up, y,
            row_stride(gate), row_stride(up),
            n_rows, n_cols,
            **blocks,
        )  # fmt: skip
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        n_rows, n_cols = gate.shape

        # The kernel takes dy at any row stride. It writes the gradients side by side, as the merged
        # product of gate and up takes them (kernels/linear.py).
        dy = as_rows(dy)
        dgate, dup = gate.new_empty(n_rows, 2 * n_cols).split(n_cols, 1)

        # One program for each tile, as in the forward pass
        blocks = elementwise_blocks(n_cols)
        row_tiles = ceil_div(n_rows, blocks["BLOCK_ROWS"])
        col_tiles = ceil_div(n_cols, blocks["BLOCK_COLS"])
        swiglu_backward_kernel[(row_tiles, col_tiles)](
            dy, gate, up, dgate, dup,
            row_stride(dy), row_stride(gate), row_stride(up), row_stride(dup),
            n_rows, n_cols,
            **blocks,
        )  # fmt: skip
        return dgate, dup
