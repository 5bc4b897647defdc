"""Codes of quantised matrices as numbers, in registers, and their scales (see ``product.py``)."""

import triton
import triton.language as tl


@triton.jit
def scales_of(
    columns,
    row,
    end,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SUB: tl.constexpr,
):
    """The scales of the two halves of the piece that begins at ``row``, or of the last one, which begins at ``end``."""
    row = tl.minimum(row, end)
    first = tl.load(columns + row // GROUP * BN)
    second = first
    if ROWS > GROUP:
        second = tl.load(columns + (row + SUB) // GROUP * BN)
    return first, second


@triton.jit
def numbers(codes, kind: tl.constexpr):
    """Codes of int8 (one a byte, 128 added) as numbers of ``kind``, exactly."""
    if kind == tl.float32:
        return (codes.to(tl.int32) - 128).to(tl.float32)
    elif kind == tl.float16:  # 1024 + 128 + code, less 1152
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, less;
            mov.b32 less, 0x64806480;
            prmt.b32 low, $2, 0x64646464, 0x4140;
            prmt.b32 high, $2, 0x64646464, 0x4342;
            sub.f16x2 $0, low, less;
            sub.f16x2 $1, high, less;
            }""",
            "=r,=r,r",
            [codes],
            tl.float16,
            True,
            4,
        )
    else:  # bf16 has room for seven bits: 128 and these, less 128 if the eighth is set, else less 256
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 both, seven, less, minus;
            mov.b32 minus, 0xBF80BF80;
            prmt.b32 both, $2, 0x43434343, 0x4140;
            and.b32 seven, both, 0xFF7FFF7F;
            lop3.b32 less, both, 0x00800080, 0xFF80FF80, 0x28;
            fma.rn.bf16x2 $0, less, minus, seven;
            prmt.b32 both, $2, 0x43434343, 0x4342;
            and.b32 seven, both, 0xFF7FFF7F;
            lop3.b32 less, both, 0x00800080, 0xFF80FF80, 0x28;
            fma.rn.bf16x2 $1, less, minus, seven;
            }""",
            "=r,=r,r",
            [codes],
            tl.bfloat16,
            True,
            4,
        )


@triton.jit
def halves(codes, kind: tl.constexpr):
    """Codes of int4 (two a byte, 8 added) as numbers of ``kind``, exactly: low halves, high halves."""
    if kind == tl.float32:
        return ((codes & 15).to(tl.int32) - 8).to(tl.float32), ((codes >> 4).to(tl.int32) - 8).to(tl.float32)
    elif kind == tl.float16:  # 1024 + 8 + code, less 1032; and (1024 + 16 * (8 + code)) / 16, less 72
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 first, second, half, less, sixteenth, minus;
            mov.b32 less, 0x64086408;
            mov.b32 sixteenth, 0x2C002C00;
            mov.b32 minus, 0xD480D480;
            prmt.b32 first, $4, 0x64646464, 0x4140;
            prmt.b32 second, $4, 0x64646464, 0x4342;
            and.b32 half, first, 0xFF0FFF0F;
            sub.f16x2 $0, half, less;
            and.b32 half, second, 0xFF0FFF0F;
            sub.f16x2 $1, half, less;
            and.b32 half, first, 0xFFF0FFF0;
            fma.rn.f16x2 $2, half, sixteenth, minus;
            and.b32 half, second, 0xFFF0FFF0;
            fma.rn.f16x2 $3, half, sixteenth, minus;
            }""",
            "=r,=r,=r,=r,r",
            [codes],
            (tl.float16, tl.float16),
            True,
            4,
        )
    else:  # 128 + 8 + code, less 136
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 half, shifted, one, minus;
            mov.b32 one, 0x3F803F80;
            mov.b32 minus, 0xC308C308;
            shr.b32 shifted, $4, 4;
            prmt.b32 half, $4, 0x43434343, 0x4140;
            and.b32 half, half, 0xFF0FFF0F;
            fma.rn.bf16x2 $0, half, one, minus;
            prmt.b32 half, $4, 0x43434343, 0x4342;
            and.b32 half, half, 0xFF0FFF0F;
            fma.rn.bf16x2 $1, half, one, minus;
            prmt.b32 half, shifted, 0x43434343, 0x4140;
            and.b32 half, half, 0xFF0FFF0F;
            fma.rn.bf16x2 $2, half, one, minus;
            prmt.b32 half, shifted, 0x43434343, 0x4342;
            and.b32 half, half, 0xFF0FFF0F;
            fma.rn.bf16x2 $3, half, one, minus;
            }""",
            "=r,=r,=r,=r,r",
            [codes],
            (tl.bfloat16, tl.bfloat16),
            True,
            4,
        )
