"""The Triton kernels of :mod:`modmoe.kernels.triton`; the only module that needs Triton, so it is imported late.

Letters as everywhere (T tokens, D model, H hidden, E experts, N assignments). "Sorted" means ordered by expert: rows
``offsets[e]`` to ``offsets[e + 1]`` belong to expert e; those past ``offsets[E]`` were dropped, and nobody reads them.
Every kernel reads the experts' weights where they are, through the table of :mod:`modmoe.kernels.triton_table`.
"""

import triton
import triton.language as tl

from modmoe.kernels.triton_table import FIELDS

HIDDEN = tl.constexpr(FIELDS.index("hidden"))
LIVE = tl.constexpr(FIELDS.index("live"))
LIVE_EXPERT = tl.constexpr(FIELDS.index("live_expert"))
LIVE_START = tl.constexpr(FIELDS.index("live_start"))
W_IN = tl.constexpr(FIELDS.index("w_in"))
B_IN = tl.constexpr(FIELDS.index("b_in"))
W_GATE = tl.constexpr(FIELDS.index("w_gate"))
B_GATE = tl.constexpr(FIELDS.index("b_gate"))
W_OUT = tl.constexpr(FIELDS.index("w_out"))
B_OUT = tl.constexpr(FIELDS.index("b_out"))

SWIZZLE = tl.constexpr(8)  # row tiles that share their weights in the L2 cache before the next column block


@triton.jit
def find_tile(offsets, num_experts, width, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's expert (>= num_experts: nothing to do), its first row, the expert's last, its column block."""
    program = tl.program_id(0)
    num_blocks = tl.cdiv(width, BLOCK_N)
    num_tiles = tl.num_programs(0) // num_blocks
    first_tile = program // (SWIZZLE * num_blocks) * SWIZZLE
    in_group = tl.minimum(num_tiles - first_tile, SWIZZLE)
    inside = program % (SWIZZLE * num_blocks)
    tile = first_tile + inside % in_group
    block = inside // in_group
    # E numbers in registers cost less than the launches that would prepare this on the device
    every = tl.arange(0, EXPERTS)
    start = tl.load(offsets + every, mask=every < num_experts, other=0)
    end = tl.load(offsets + every + 1, mask=every < num_experts, other=0)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    own = every == expert
    first = tl.sum(tl.where(own, start + (tile - last + tiles) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(own, end, 0), 0), block


@triton.jit
def rows_of(table, field: tl.constexpr, expert, num_experts, like, ALIGNED: tl.constexpr):
    """The pointer to one expert's rows."""
    pointer = tl.load(table + field * num_experts + expert).to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def hidden_size(table, expert, num_experts, ALIGNED: tl.constexpr):
    size = tl.load(table + HIDDEN * num_experts + expert).to(tl.int32)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return size


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter's product of bfloat16 is wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def tanh(z):
    # 1 - 2 / (e^2|z| + 1) loses digits near 0, where the series has all of them (next term: 2e-10 of z at 0.1)
    size = tl.abs(z)
    square = z * z
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    near = size * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    value = tl.where(size < 0.1, near, far)
    return tl.where(z < 0, -value, value)


@triton.jit
def activate(z, KIND: tl.constexpr):
    """act(z) and act'(z), of float32; the compiler drops what is not used."""
    if KIND == "relu":
        value = tl.where(z < 0, 0.0, z)
        slope = tl.where(z > 0, 1.0, 0.0)
    elif KIND == "silu":
        open_ = tl.sigmoid(z)
        value = z * open_
        slope = open_ * (1 + z * (1 - open_))
    elif KIND == "tanh":
        value = tanh(z)
        slope = 1 - value * value
    elif KIND == "gelu_tanh":
        t = tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))  # sqrt(2 / pi)
        value = 0.5 * z * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * z * z)
    else:
        tl.static_assert(KIND == "gelu")
        below = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        value = z * below
        slope = below + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)  # 1 / sqrt(2 pi)
    return value, slope


@triton.jit
def hidden_forward(
    x,
    token,
    offsets,
    table,
    pre,
    pre_gate,
    hidden,
    num_experts,
    in_features,
    hidden_max,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden = act(x[token] W_in + b_in), or act(x[token] W_gate + b_gate) * (x[token] W_in + b_in); sorted (N, H)."""
    expert, first, end, block = find_tile(offsets, num_experts, hidden_max, EXPERTS, BLOCK_M, BLOCK_N)
    if expert >= num_experts:
        return
    size = hidden_size(table, expert, num_experts, ALIGNED)
    if block * BLOCK_N >= size:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    source = x + tl.load(token + rows, mask=rows < end, other=0)[:, None] * in_features
    w_in = rows_of(table, W_IN, expert, num_experts, x, ALIGNED)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATED:
        w_gate = rows_of(table, W_GATE, expert, num_experts, x, ALIGNED)
        total_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, in_features, BLOCK_K):
        k = start + inner
        a = tl.load(source + k[None, :], mask=(rows < end)[:, None] & (k < in_features)[None, :], other=0.0)
        where = k[:, None] * size + columns[None, :]
        mask = (k < in_features)[:, None] & (columns < size)[None, :]
        total = multiply(a, tl.load(w_in + where, mask=mask, other=0.0), total, PRECISION, UPCAST)
        if GATED:
            total_gate = multiply(a, tl.load(w_gate + where, mask=mask, other=0.0), total_gate, PRECISION, UPCAST)
    target = rows.to(tl.int64)[:, None] * hidden_max + columns[None, :]
    mask = (rows < end)[:, None] & (columns < size)[None, :]
    if BIAS:
        b_in = rows_of(table, B_IN, expert, num_experts, x, ALIGNED)
        total += tl.load(b_in + columns, mask=columns < size, other=0.0).to(tl.float32)[None, :]
    if SAVE:
        tl.store(pre + target, total.to(pre.dtype.element_ty), mask=mask)
    if GATED:
        if BIAS:
            b_gate = rows_of(table, B_GATE, expert, num_experts, x, ALIGNED)
            total_gate += tl.load(b_gate + columns, mask=columns < size, other=0.0).to(tl.float32)[None, :]
        if SAVE:
            tl.store(pre_gate + target, total_gate.to(pre.dtype.element_ty), mask=mask)
        value, _ = activate(total_gate, ACTIVATION)
        value = value * total
    else:
        value, _ = activate(total, ACTIVATION)
    tl.store(hidden + target, value.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def scatter_product(
    a,
    a_gate,
    target,
    order,
    weight,
    offsets,
    table,
    out,
    num_experts,
    width,
    hidden_max,
    BACKWARD: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ATOMIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Forward: out[target] = weight (a W_out + b_out). BACKWARD: out[target] = a W_in^T + a_gate W_gate^T.

    a is sorted (N, H), out (.., width). With ATOMIC, rows of ``out`` are added to, and may repeat in ``target``.
    """
    expert, first, end, block = find_tile(offsets, num_experts, width, EXPERTS, BLOCK_M, BLOCK_N)
    if expert >= num_experts:
        return
    size = hidden_size(table, expert, num_experts, ALIGNED)
    rows = first + tl.arange(0, BLOCK_M)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    source = rows.to(tl.int64)[:, None] * hidden_max
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    matrix = rows_of(table, W_IN if BACKWARD else W_OUT, expert, num_experts, a, ALIGNED)
    if GATED:
        gate = rows_of(table, W_GATE, expert, num_experts, a, ALIGNED)
    for start in range(0, size, BLOCK_K):
        k = start + inner
        a_mask = (rows < end)[:, None] & (k < size)[None, :]
        where = columns[None, :] * size + k[:, None] if BACKWARD else k[:, None] * width + columns[None, :]
        mask = (k < size)[:, None] & (columns < width)[None, :]
        left = tl.load(a + source + k[None, :], mask=a_mask, other=0.0)
        total = multiply(left, tl.load(matrix + where, mask=mask, other=0.0), total, PRECISION, UPCAST)
        if GATED:
            left = tl.load(a_gate + source + k[None, :], mask=a_mask, other=0.0)
            total = multiply(left, tl.load(gate + where, mask=mask, other=0.0), total, PRECISION, UPCAST)
    if BIAS:
        b_out = rows_of(table, B_OUT, expert, num_experts, a, ALIGNED)
        total += tl.load(b_out + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    if not BACKWARD:
        assignment = tl.load(order + rows, mask=rows < end, other=0)
        total *= tl.load(weight + assignment, mask=rows < end, other=0.0).to(tl.float32)[:, None]
    place = out + tl.load(target + rows, mask=rows < end, other=0)[:, None] * width + columns[None, :]
    mask = (rows < end)[:, None] & (columns < width)[None, :]
    if ATOMIC:
        tl.atomic_add(place, total, mask=mask, sem="relaxed")
    else:
        tl.store(place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def hidden_backward(
    grad,
    token,
    order,
    weight,
    offsets,
    table,
    pre,
    pre_gate,
    hidden,
    grad_pre,
    grad_pre_gate,
    grad_weight,
    num_rows,
    num_experts,
    out_features,
    hidden_max,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    X_GRAD: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    ROW_GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """u = grad[token] W_out^T, and from it everything that the saved pre-activations lead to.

    ``grad_pre`` (and ``grad_pre_gate``) = weight u act'(pre), for every row (X_GRAD) or for live experts only;
    ``hidden`` = weight act(pre), for the weight gradients (ROW_GRAD) of live experts; and
    ``grad_weight[block, assignment]`` = <u, act(pre)> + <grad[token], b_out> in parts that the caller adds up.
    """
    expert, first, end, block = find_tile(offsets, num_experts, hidden_max, EXPERTS, BLOCK_M, BLOCK_N)
    if expert >= num_experts:
        return
    size = hidden_size(table, expert, num_experts, ALIGNED)
    live = tl.load(table + LIVE * num_experts + expert) != 0
    if block * BLOCK_N >= size:
        return
    if not X_GRAD and not WEIGHT_GRAD:  # noqa: SIM102 - joined, it would be a condition of the running kernel
        if not live:  # nobody asks what a frozen expert's hidden layer receives
            return
    rows = first + tl.arange(0, BLOCK_M)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    row_mask = rows < end
    source = grad + tl.load(token + rows, mask=row_mask, other=0)[:, None] * out_features
    part = tl.zeros((BLOCK_M,), tl.float32)
    if WEIGHT_GRAD and BIAS:  # noqa: SIM102 - as above
        if block == 0:  # before the product, whose sums take most registers
            b_out = rows_of(table, B_OUT, expert, num_experts, grad, ALIGNED)
            for start in range(0, out_features, BLOCK_K):
                k = start + inner
                a = tl.load(source + k[None, :], mask=row_mask[:, None] & (k < out_features)[None, :], other=0.0)
                bias = tl.load(b_out + k, mask=k < out_features, other=0.0)
                part += tl.sum(a.to(tl.float32) * bias.to(tl.float32)[None, :], 1)
    w_out = rows_of(table, W_OUT, expert, num_experts, grad, ALIGNED)
    u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, out_features, BLOCK_K):
        k = start + inner
        a = tl.load(source + k[None, :], mask=row_mask[:, None] & (k < out_features)[None, :], other=0.0)
        mask = (k < out_features)[:, None] & (columns < size)[None, :]
        b = tl.load(w_out + columns[None, :] * out_features + k[:, None], mask=mask, other=0.0)
        u = multiply(a, b, u, PRECISION, UPCAST)
    assignment = tl.load(order + rows, mask=row_mask, other=0)
    scale = tl.load(weight + assignment, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    place = rows.to(tl.int64)[:, None] * hidden_max + columns[None, :]
    mask = row_mask[:, None] & (columns < size)[None, :]
    z = tl.load(pre + place, mask=mask, other=0.0).to(tl.float32)
    live_mask = mask & live
    wanted = mask if X_GRAD else live_mask
    if GATED:
        value, slope = activate(tl.load(pre_gate + place, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
        if X_GRAD or ROW_GRAD:
            grad_gate = scale * u * z * slope
            tl.store(grad_pre_gate + place, grad_gate.to(grad_pre.dtype.element_ty), mask=wanted)
        slope = value
        value = value * z
    else:
        value, slope = activate(z, ACTIVATION)
    if X_GRAD or ROW_GRAD:
        tl.store(grad_pre + place, (scale * u * slope).to(grad_pre.dtype.element_ty), mask=wanted)
    if ROW_GRAD:
        tl.store(hidden + place, (scale * value).to(hidden.dtype.element_ty), mask=live_mask)
    if WEIGHT_GRAD:
        part += tl.sum(u * value, 1)
        tl.store(grad_weight + tl.cast(block, tl.int64) * num_rows + assignment, part, mask=row_mask)


@triton.jit
def weight_gradient(
    a,
    b,
    token,
    order,
    weight,
    offsets,
    table,
    grad,
    grad_bias,
    num_experts,
    features,
    hidden_max,
    INPUT: tl.constexpr,
    BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One live expert's weight and bias gradient: the second axis of the grid counts live experts only.

    INPUT: sum over its rows of a[token]^T b, (features, H), for a (T, D) and sorted b (N, H).
    Otherwise: sum of a^T b[token], (H, features), for sorted a (N, H), which holds the combine weights already, and
    b (T, D_out); its bias is the sum of weight b[token].
    The gradients of all live experts lie one behind the other, without gaps.
    """
    number = tl.program_id(1)
    expert = tl.load(table + LIVE_EXPERT * num_experts + number)
    begin = tl.load(table + LIVE_START * num_experts + number)
    size = hidden_size(table, expert, num_experts, ALIGNED)
    height = features if INPUT else size
    width = size if INPUT else features
    num_blocks = tl.cdiv(hidden_max if INPUT else features, BLOCK_N)
    row_block = tl.program_id(0) // num_blocks
    column_block = tl.program_id(0) % num_blocks
    if (row_block * BLOCK_M >= height) | (column_block * BLOCK_N >= width):
        return
    first = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_K):
        rows = start + inner
        row_mask = rows < end
        tokens = tl.load(token + rows, mask=row_mask, other=0)
        a_rows = tokens * features if INPUT else rows.to(tl.int64) * hidden_max
        b_rows = rows.to(tl.int64) * hidden_max if INPUT else tokens * features
        left = tl.load(a + a_rows[None, :] + m[:, None], mask=row_mask[None, :] & (m < height)[:, None], other=0.0)
        right = tl.load(b + b_rows[:, None] + n[None, :], mask=row_mask[:, None] & (n < width)[None, :], other=0.0)
        total = multiply(left, right, total, PRECISION, UPCAST)
    mask = (m < height)[:, None] & (n < width)[None, :]
    target = grad + begin * features + m.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(target, total.to(grad.dtype.element_ty), mask=mask)
    if BIAS:  # noqa: SIM102 - as above
        if row_block == 0:  # a second pass over one column block: the first one's loop stays a plain product
            bias = tl.zeros((BLOCK_N,), tl.float32)
            for start in range(first, end, BLOCK_K):
                rows = start + inner
                row_mask = rows < end
                tokens = tl.load(token + rows, mask=row_mask, other=0)
                b_rows = rows.to(tl.int64) * hidden_max if INPUT else tokens * features
                inside = row_mask[:, None] & (n < width)[None, :]
                right = tl.load(b + b_rows[:, None] + n[None, :], mask=inside, other=0.0).to(tl.float32)
                if not INPUT:
                    assignment = tl.load(order + rows, mask=row_mask, other=0)
                    right *= tl.load(weight + assignment, mask=row_mask, other=0.0).to(tl.float32)[:, None]
                bias += tl.sum(right, 0)
            place = begin if INPUT else number.to(tl.int64) * features
            tl.store(grad_bias + place + n, bias.to(grad.dtype.element_ty), mask=n < width)
