"""The emulator's half-precision numbers are those of a GPU, to the bit."""

from ctypes import c_float, c_uint16

import torch


def test_float16_and_bfloat16_round_as_torch_does(built):
    to_float = built.library.emulator_half_to_float
    to_half, to_bfloat16 = built.library.emulator_float_to_half, built.library.emulator_float_to_bfloat16
    to_float.argtypes, to_float.restype = [c_uint16], c_float
    for convert in (to_half, to_bfloat16):
        convert.argtypes, convert.restype = [c_float], c_uint16

    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16).float()
    got = torch.tensor([to_float(b & 0xFFFF) for b in bits.tolist()])
    assert torch.equal(got.nan_to_num(1e30), halves.nan_to_num(1e30))

    # Numbers of every magnitude, and those half-way between two neighbours.
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(20_000, generator=generator) * 2.0 ** torch.randint(
        -30, 20, (20_000,), generator=generator
    )
    finite = halves[halves.isfinite()]
    halfway = (finite.unique()[1:] + finite.unique()[:-1]) / 2
    for numbers in (some, halfway, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 65519.0, 65520.0, 1e-8])):
        for convert, dtype in ((to_half, torch.float16), (to_bfloat16, torch.bfloat16)):
            got = torch.tensor([convert(x) for x in numbers.tolist()], dtype=torch.int32).to(torch.int16)
            assert torch.equal(got, numbers.to(dtype).view(torch.int16)), dtype
