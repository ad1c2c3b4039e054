"""Number formats: bit for bit what compressed-tensors makes of the same tensors, and the bytes that it writes.

The package is the oracle. The digests below were made with it (0.20.0, on a CPU), so that a later version that rounds
otherwise is told from a change of ours: `python tests/test_precision.py` prints them.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blocks.errors import ConfigError
from blocks.formats import FORMATS, Format, Integer, NvFloat4, Quantized, _to_minifloat, format_named, to_e2m1, to_e4m3

ROWS, COLUMNS = 6, 256
QUANTIZED = [name for name in FORMATS if name != "bf16"]
FP32_SCALES = [replace(FORMATS[name], scale_dtype=torch.float32) for name in ("fp8", "int4", "int4-g32", "int8")]
FORMATS_TESTED = [*(FORMATS[name] for name in QUANTIZED), *FP32_SCALES, Integer("int3-g128", 3, group=128)]


def label(format: Format) -> str:
    return f"{format.name}-fp32" if format in FP32_SCALES else format.name


def uniform(rows: int, columns: int, seed: int) -> Tensor:
    """Numbers in [-1, 1) in fp64, from a linear congruence: the same on every machine and version."""
    state, out = seed, []
    for _ in range(rows * columns):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        out.append((state >> 33) / 2**30 - 1)
    return torch.tensor(out, dtype=torch.float64).reshape(rows, columns)


def tensors() -> dict[str, Tensor]:
    x = uniform(ROWS, COLUMNS, 1)
    y = uniform(ROWS, COLUMNS, 2)
    out = {"weights": x * x * x * 0.2, "zeros": x * 0, "equal": x * 0 + 0.3, "powers": torch.exp2((x * 120).round())}
    out["some zero rows and blocks"] = x.clone()
    out["some zero rows and blocks"][1] = 0
    out["some zero rows and blocks"][2, 32:176] = 0
    out["negative zeros"] = torch.where(y > 0, -0.0, x)
    out["outliers"] = torch.where(y > 0.98, x * 1e4, x * 1e-2)
    out["denormals"] = x * 1e-39
    out["denormals beside ones"] = torch.where(y > 0.5, x, x * 1e-40)
    out["tiny"] = x * 1e-36
    out["huge"] = x * 3e38
    out["huge ranges"] = torch.where(y > 0.5, x * 1e30, x * 1e-30)
    out["rows of all sizes"] = x * torch.exp2(torch.arange(ROWS, dtype=torch.float64) * 20 - 50)[:, None]
    out["one number"] = torch.zeros_like(x)
    out["one number"][3, 77] = -1.7
    # Halfway between codes, where only the rule of ties decides: with 6, 7.5 and 448 in each block, steps are round.
    ties = (x * 16).round() / 2 + 0.25 * (y * 2).round()
    ties[:, ::16] = 6
    out["ties of e2m1"] = ties
    ties = (x * 16).round() / 2
    ties[:, ::32] = 7.5
    out["ties of int4"] = ties
    ties = torch.exp2((y * 9).round()) * (1 + (x.abs() * 16).floor() / 16) * torch.where(x < 0, -1.0, 1.0)
    ties[:, 0] = 448
    out["ties of e4m3"] = ties.clamp(-448, 448)
    return {name: each.float() for name, each in out.items()}


def digest(*parts: Tensor) -> str:
    """Of the bits, so that -0 is not 0."""
    data = hashlib.sha256()
    for part in parts:
        data.update(part.contiguous().float().numpy().tobytes())
    return data.hexdigest()[:8]


def args_of(format: Format) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    common: dict[str, Any] = {"num_bits": format.bits, "symmetric": True, "dynamic": False}
    if isinstance(format, NvFloat4):
        types = {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
        return QuantizationArgs(type="float", strategy="tensor_group", group_size=16, **types, **common)
    kind = "int" if isinstance(format, Integer) else "float"
    where = {"strategy": "group", "group_size": format.group} if format.group else {"strategy": "channel"}
    return QuantizationArgs(type=kind, scale_dtype=format.scale_dtype, **where, **common)


def theirs(format: Format, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor, dict[str, Tensor]]:
    """By compressed-tensors: scales, divisor, the values fake-quantized, and what it would put on disk."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = args_of(format)
    grouped = weight.unflatten(-1, (-1, format.group or weight.shape[-1]))
    divisor = generate_gparam(weight.min(), weight.max()) if isinstance(format, NvFloat4) else None
    scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args, global_scale=divisor)
    assert not zero_point.any()
    fake = fake_quantize(weight, scale, None, args, global_scale=divisor)

    inputs = None
    if format.input_bits < 16 and divisor is None:
        inputs = args.model_copy(update={"strategy": "token", "dynamic": True, "group_size": None})
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    kind = "nvfp4-pack-quantized" if divisor is not None else ("pack-quantized" if inputs is None else None)
    kind = kind or ("int-quantized" if isinstance(format, Integer) else "float-quantized")
    state = {"weight": weight, "weight_scale": scale}
    if divisor is not None:
        state["weight_global_scale"] = divisor
    disk = BaseCompressor.get_value_from_registry(kind).compress(state, scheme)
    disk["weight_scale"] = disk["weight_scale"].to(args.scale_dtype)
    if divisor is not None and format.input_bits == 4:
        disk["input_global_scale"] = torch.ones(1)
    return scale, divisor, fake, disk


def parts_of(format: Format, scale: Tensor, divisor: Tensor | None, fake: Tensor) -> list[Tensor]:
    """Integers have no -0, and a checkpoint of them neither; fake-quantized by the package, they keep the sign."""
    values = fake + 0.0 if isinstance(format, Integer) else fake
    return [scale, values] + ([] if divisor is None else [divisor])


def ours(format: Format, weight: Tensor) -> list[Tensor]:
    done = format.nearest(weight)
    assert digest(done.weight) == digest(format.fake(weight))
    return parts_of(format, done.scales.values, done.scales.divisor, done.weight)


# In the order of `tensors`.
DIGESTS = {
    "fp8": "557587bc 4b6d7c33 c6ebbbe2 5b25c065 9af5820c 997519ac 8f63d637 4b6d7c33 25dbadba "
    "e6069ddf eb880926 a0302118 13793db7 f537aaf2 fcee94da 78162f0f 463aa772",
    "nvfp4": "166fb4e6 0f1a7460 5d9418ff 7bf43622 bdde2472 57f184dc a68510ed 12e0e8fb a8e4a0b8 "
    "12e0e8fb 94125862 620922b6 86a6f8e3 f3b22bb1 e23e7431 26c6eebc 768d4aa6",
    "nvfp4a16": "166fb4e6 0f1a7460 5d9418ff 7bf43622 bdde2472 57f184dc a68510ed 12e0e8fb a8e4a0b8 "
    "12e0e8fb 94125862 620922b6 86a6f8e3 f3b22bb1 e23e7431 26c6eebc 768d4aa6",
    "int4": "3a2a612a fbdbd002 9fb6fee7 72a1edf0 f714f43a 8590afd1 ecf45dec b1b4367c 38d56448 "
    "5e03abab 9a8e9420 075e12ad 2b77cadf 6e7db148 05f407d5 e9077668 e2c89dd5",
    "int4-g32": "90540411 3680029e 5e869bcd c4c2cdba 92e869e3 9853e607 c4348adb 617c8827 d4f429fc "
    "8d825e37 d783d225 6d8cdc2c 61a61253 d13f237a 47c60183 62008498 5f814c67",
    "int8": "70f22a9e 6ac524cf 1adb1fdf a8cfcca0 21b16ade da0e5a4d f79ca935 6ac524cf 28225bc6 "
    "acd14a02 a55b9152 d0a17650 18df0036 c2d443a8 713841eb 7fbc1bc4 16bf1467",
    "int3": "55602c1a 25db290d fd7e41bb f60c0ada 947999a9 83a37aee ddd76f35 f8a5ffec 3098fc85 "
    "90a75695 61458624 a516f023 991486f5 d9b8fa86 48e0c4e6 46cee8de b1c7123d",
    "fp8-fp32": "af35e8bc 5b1ed27a 8267133d 5adf0224 0107dd63 715f4336 789d5660 3d5d7340 0747d1a8 "
    "ddf49156 c83776de d516678d 27dd4d4c f04e030f 1ec712ff 8edaf243 463aa772",
    "int4-fp32": "d7168633 b30dfa42 256fca95 7d7c8120 8e95d1e1 36e7e4de 8eec55db 7b100f67 bdebd366 "
    "83be47ce c7013dab a9079c46 8ae91657 ae222e1a a9976914 9bcd4086 a455b624",
    "int4-g32-fp32": "ee5ac8b1 b9090e73 e3a3661b 00388e5f 645cfdb9 ece9512e 88ee976f d5eea895 94c9377b "
    "6a272f3f dfa69ba8 ace49dea 8a9a93d6 894073b1 b5ddf46e 6eae137d 9acda071",
    "int8-fp32": "d5c10708 376384b2 70926741 651d9821 3bb8481b ba24a98d 5147ca25 c8951ddf 11974d00 "
    "751358f8 52446614 c56f3347 84c0ef00 220ca415 5fab9413 0c905454 2f08222b",
    "int3-g128": "f29f4ccd fbdbd002 95f42492 6a6510d0 1d9e34a9 74ceef52 bbbf4430 c514a0e2 09291aa3 "
    "d3f2face 14634908 8ea7fb86 e07e2705 b382311c d366a3bd e4df7a01 88f15f54",
}


@pytest.mark.parametrize("format", FORMATS_TESTED, ids=label)
def test_every_bit_is_the_stored_one(format: Format) -> None:
    stored = dict(zip(tensors(), DIGESTS[label(format)].split(), strict=True))
    assert not {name for name, weight in tensors().items() if digest(*ours(format, weight)) != stored[name]}


@pytest.mark.parametrize("format", FORMATS_TESTED, ids=label)
def test_every_bit_is_that_of_compressed_tensors(format: Format) -> None:
    shapes = {
        f"random {seed}": torch.randn(64, 512, generator=torch.Generator().manual_seed(seed)) for seed in range(4)
    }
    for name, weight in (tensors() | shapes).items():
        scale, divisor, fake, _ = theirs(format, weight)
        wanted = parts_of(format, scale, divisor, fake)
        for ours_, theirs_ in zip(ours(format, weight), wanted, strict=True):
            assert digest(ours_) == digest(theirs_), name


@pytest.mark.parametrize("format", FORMATS_TESTED, ids=label)
def test_bytes_are_those_that_compressed_tensors_writes(format: Format) -> None:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    for rows, columns in (6, 256), (1, 128), (40, 384):
        weight = uniform(rows, columns, rows).float()
        *_, disk = theirs(format, weight)
        assert format.bytes(rows, columns) == sum(each.numel() * each.element_size() for each in disk.values())
        codes = disk.get("weight")
        if codes is None and isinstance(format, NvFloat4):
            codes = unpack_fp4_from_uint8(disk["weight_packed"], rows, columns)
        elif codes is None:
            codes = unpack_from_int32(disk["weight_packed"], format.bits, weight.shape)
        assert digest(codes) == digest(format.nearest(weight).codes)


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "int8"])
def test_dynamic_inputs_are_those_of_compressed_tensors(name: str) -> None:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp, generate_gparam

    format = replace(FORMATS[name], input_bits=FORMATS[name].bits)
    args = args_of(format)
    if not isinstance(format, NvFloat4):
        args = args.model_copy(update={"strategy": "token", "dynamic": True, "scale_dtype": None})
    for title, each in tensors().items():
        inputs = each.unflatten(0, (2, 3))  # [sequences, tokens, columns]
        calibrated = torch.tensor([3.0])
        divisor = generate_gparam(-calibrated, calibrated) if isinstance(format, NvFloat4) else None
        scale, _ = compute_dynamic_scales_and_zp(inputs, args, torch.nn.Module(), global_scale=divisor)
        wanted = fake_quantize(inputs, scale, None, args, global_scale=divisor)
        assert digest(format.fake_input(inputs, format.divisor(calibrated)) + 0.0) == digest(wanted + 0.0), title


def test_bytes_by_hand() -> None:
    rows, columns = 576, 1536
    expected = {
        "bf16": 2 * 576 * 1536,
        "fp8": 576 * 1536 + 576 * 2,  # a bf16 scale of each row
        "nvfp4": 576 * 768 + 576 * 96 + 8,  # E4M3 scales of 16; fp32 divisors of weights and inputs
        "nvfp4a16": 576 * 768 + 576 * 96 + 4,
        "int4": 576 * 768 + 576 * 12 * 2 + 16,
        "int4-g32": 576 * 768 + 576 * 48 * 2 + 16,
        "int8": 576 * 1536 + 576 * 2 + 16,
        "int3": 576 * 1536 * 3 // 8 + 576 * 24 * 2 + 16,
    }
    assert {name: format.bytes(rows, columns) for name, format in FORMATS.items()} == expected
    assert FORMATS["nvfp4a16"].bits_per_weight(8192, 8192) == pytest.approx(4.5, abs=1e-5)
    assert FORMATS["int4"].bits_per_weight(8192, 8192) == pytest.approx(4.125, abs=1e-5)
    assert Integer("int3", 3, group=32).bytes(1, 32) == 3 * 4 + 2 + 16


def test_a_row_of_nvfp4_by_hand() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :8] = torch.tensor([6.0, -3.5, 2.5, 1.75, 0.75, 0.25, -0.1, 5.0])
    weight[0, 16:18] = torch.tensor([3.0, 0.2])
    done = FORMATS["nvfp4"].nearest(weight)
    assert done.scales.divisor is not None and done.scales.divisor.item() == pytest.approx(6 * 448 / 6)
    torch.testing.assert_close(done.scales.values, torch.tensor([[448.0, 224.0]]), rtol=0, atol=0)
    assert done.codes[0, :8].tolist() == [6, -4, 2, 2, 1, 0, 0, 4]  # ties go to the even code
    assert done.codes[0, 16:18].tolist() == [6, 0.5]
    torch.testing.assert_close(done.weight[0, 16:18], torch.tensor([3.0, 0.25]))


def test_the_divisor_has_the_last_bit_of_compressed_tensors() -> None:
    amax = torch.tensor([1 / 7, 2 / 7, 4 / 7])  # quotients would be 18816, 9408, 4704
    found = [FORMATS["nvfp4"].divisor(each).item() for each in amax]
    assert found == [18815.998046875, 9407.9990234375, 4703.99951171875]


def test_a_group_of_int4_by_hand() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([7.5, -7.5, 1.5, 2.5, -0.5, 0.51])
    done = FORMATS["int4-g32"].nearest(weight)
    assert done.scales.values.tolist() == [[1.0]]
    assert done.codes[0, :6].tolist() == [7, -8, 2, 2, 0, 1]


def test_small_floats_are_the_nearest_of_their_grid() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = every[every.isfinite()].sort().values
    between = (grid[1:] + grid[:-1]) / 2
    eighths = grid[:-1, None] + (grid[1:] - grid[:-1])[:, None] * torch.arange(1, 8) / 8
    x = torch.cat(
        [grid, between, eighths.flatten(), torch.randn(10000, generator=torch.Generator().manual_seed(0)) * 50]
    )
    rounded = to_e4m3(x)
    assert torch.equal(rounded, _to_minifloat(x.clamp(-448, 448), lowest=-6, mantissa=3))  # devices without the type
    best = (x[:, None] - grid).abs().amin(1)
    assert torch.equal((rounded - x).abs(), best) and bool(torch.isin(rounded, grid).all())
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = torch.cat([-grid, grid])
    x = torch.linspace(-7, 7, 1 + 14 * 64)
    assert torch.equal((to_e2m1(x) - x).abs(), (x[:, None] - grid).abs().amin(1))
    assert bool(torch.isin(to_e2m1(x), grid).all())


def test_matrices_that_share_a_divisor_are_quantized_as_one() -> None:
    q, k = uniform(4, 64, 3).float(), uniform(2, 64, 4).float() * 7
    format = FORMATS["nvfp4a16"]
    shared = format.divisor(q, k)
    together = format.fake(torch.cat([q, k]))
    assert torch.equal(torch.cat([format.fake(q, shared), format.fake(k, shared)]), together)
    assert not torch.equal(format.fake(q), together[:4])


@pytest.mark.parametrize("name", QUANTIZED)
def test_what_is_on_the_grid_stays(name: str) -> None:
    format, weight = FORMATS[name], uniform(4, 256, 5).float()
    done = format.nearest(weight)
    again = Quantized(format, format.quantize(done.weight, done.scales), done.scales)
    assert torch.equal(again.weight, done.weight)
    assert format.fake(weight.bfloat16()).dtype == torch.float32
    # Integers: half a step, and as much again for the largest, which the range and the bf16 scale cut.
    largest_error = done.scales.steps.amax() * {"fp8": 16, "nvfp4": 1, "nvfp4a16": 1}.get(name, 0.95)
    assert (done.weight - weight).abs().amax() <= largest_error


def test_inputs_are_left_alone_or_quantized_token_by_token() -> None:
    inputs = uniform(3, 64, 6).float() * torch.tensor([[1.0], [100.0], [1e-3]])
    for name in ("bf16", "int4", "int8", "nvfp4a16"):
        assert torch.equal(FORMATS[name].fake_input(inputs), inputs)
    alone = torch.cat([FORMATS["fp8"].fake_input(token[None]) for token in inputs])
    assert torch.equal(FORMATS["fp8"].fake_input(inputs), alone) and not torch.equal(alone, inputs)
    assert ((alone - inputs).norm(dim=1) / inputs.norm(dim=1)).amax() < 0.04
    fp4 = FORMATS["nvfp4"].fake_input(inputs, FORMATS["nvfp4"].divisor(inputs))
    assert 0.04 < (fp4[1] - inputs[1]).norm() / inputs[1].norm() < 0.2


def test_shapes_that_do_not_fit_are_refused_in_one_line() -> None:
    for name, columns in (("int4", 192), ("nvfp4", 24), ("int4-g32", 16)):
        for act in (FORMATS[name].fake, lambda w: FORMATS[name].bytes(*w.shape)):  # noqa: B023
            with pytest.raises(ConfigError, match=rf"^{name}: .*{columns} inputs.*multiple of") as raised:
                act(torch.zeros(2, columns))
            assert "\n" not in str(raised.value)
    FORMATS["fp8"].check(7)


def test_a_wrong_name_offers_the_nearest() -> None:
    assert format_named("nvfp4") is FORMATS["nvfp4"]
    with pytest.raises(ConfigError, match="did you mean int4"):
        format_named("int-4")
    assert all(name == format.name for name, format in FORMATS.items())


if __name__ == "__main__":
    for each in FORMATS_TESTED:
        digests = [digest(*parts_of(each, *theirs(each, matrix)[:3])) for matrix in tensors().values()]
        print(f'    "{label(each)}": "{" ".join(digests[:9])} "\n    "{" ".join(digests[9:])}",')
