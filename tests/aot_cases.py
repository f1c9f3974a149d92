"""Every kernel as it runs at the shapes that matter, to be compiled ahead of time
(`static_gate.py`)."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from resae_kernels.triton import (
    decode,
    encode_few,
    gemm,
    gemm_specialised,
    residual,
    screening,
    selection,
    step,
    tiles,
)
from resae_kernels.triton.keys import KEYS


class AotCase(NamedTuple):
    """A kernel as it is launched, to be compiled ahead of time (`tests/static_gate.py`)."""

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    """Type of each argument that is no constexpr: `*bf16:16`, `i32`, or a tuple of such. `:16` says
    that the launcher finds it divisible by 16: a pointer's address, a size."""
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    expect: Mapping[str, int | bool]
    """Properties that the machine code must have, in the terms of `tests/static_gate.py`."""
    architectures: tuple[str, ...] = ("sm_80", "sm_90", "sm_100")
    register_budget: int | None = None
    """Argument of `launch_options`."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that the machine code depends on but the architecture."""
        given = (sorted(map(repr, part.items())) for part in (self.signature, self.constexprs))
        launch = (self.num_warps, self.num_stages, self.register_budget)
        return (repr(self.kernel), *map(tuple, given), *launch)


def all_cases() -> Iterator[AotCase]:
    """The cases of every kernel."""
    yield from decode_cases()
    yield from encode_cases()
    yield from gemm_cases()
    yield from few_token_cases()
    yield from screening_cases()
    yield from step_cases()


def decode_cases() -> Iterator[AotCase]:
    """The kernels of the decode, its error and the two sums of its backward."""
    D, k = 2048, 64
    i64 = "*i64:16"
    for name, dtype, architectures in (
        ("bf16", torch.bfloat16, ("sm_80", "sm_90", "sm_100")),
        ("fp32", torch.float32, ("sm_90",)),
    ):
        floats = f"*{name}:16"
        for (N, T, target), tile in (
            (case, tile)
            for case in ((8192, 1, False), (1, 1, False), (1, 4, False), (8192, 1, True))
            for tile in tiles.TILES[decode.decode_tile_name(case[0])].candidates("other")
        ):
            constants = decode.decode_constants(tile, N, (k,) * T, D, dtype)
            pointers = {"out": floats, "bias": floats, "prediction": "*fp32:16"}
            # Few tokens make few programs: their registers are not what limits them.
            few = {"shared": 1024, "barriers": 5, "registers": 128}
            # The loop over wide rows is unrolled, and loads mix with uses.
            in_flight = tile.loads if dtype.itemsize == 2 else tile.loads // 2
            many = {"shared": 0, "barriers": 0, "registers": 80, "in_flight": in_flight}
            expect = few if constants["SPREAD"] else many
            if target:
                pointers |= {"target": floats, "squared": "*fp32:16"}
                # The squares of several warps meet in shared memory.
                if tile.num_warps > 1:
                    expect = expect | {"shared": 64, "barriers": 2}
            else:
                constants |= {"target": None, "squared": None}
            yield AotCase(
                f"decode {name} N={N} dictionaries={T}{' error' * target} {tiles.sizes(tile)}",
                decode.decode_kernel,
                dict.fromkeys(("acts", "W_dec"), (floats,) * T)
                | {"indices": (i64,) * T}
                | pointers,
                constants,
                *(tile.num_warps, 1),
                expect | {"matrix": False, "loads_128": T * tile.loads, "instructions": 1000},
                architectures,
                decode.decode_registers(N, dtype),
            )

        for tile in tiles.TILES["sddmm"].candidates("other"):
            yield AotCase(
                f"sddmm {name} {tiles.sizes(tile)}",
                decode.sddmm_kernel,
                dict.fromkeys(("out", "grad", "W"), floats) | {"indices": i64},
                decode.sddmm_constants(tile, k, D, dtype),
                *(tile.num_warps, 1),
                {
                    "matrix": False,
                    "in_flight": tile.loads,
                    "registers": tiles.GATHER_REGISTERS,
                    "instructions": 500,
                },
                architectures,
                tiles.GATHER_REGISTERS,
            )

        yield AotCase(
            f"scatter {name}",
            decode.scatter_kernel,
            {"code": floats, "acts": floats, "indices": i64, "M": "i32:16"},
            decode.scatter_constants(256, dtype),
            *(4, 1),
            {"matrix": False, "registers": 96, "instructions": 1000},
            architectures,
        )

        kernels = (
            # The sum in fp32 changes hands on its way to 16-byte stores.
            (
                decode.latent_piece_kernel,
                {"piece_latent": i64, "M": "i32"},
                ("piece_total",),
                2048,
            ),
            (decode.scatter_outer_kernel, {"out": floats}, ("total", "piece_total"), 0),
        )
        default, *alternatives = tiles.TILES["scatter_outer"].candidates("other")
        # The sums of an encoder and of a dictionary in one launch; of the former; of the latter.
        shapes = ((default, True, 2), (default, True, 1), (default, False, 1))
        shapes += tuple((tile, True, 2) for tile in alternatives)
        for (kernel, others, totals, shared), (tile, total, sums) in itertools.product(
            kernels, shapes
        ):
            kernel_name = kernel.__name__.removesuffix("_kernel")
            each = {"weights": floats, "rows": floats, "partial": "*fp32:16"}
            each |= {"out": others["out"]} if "out" in others else {}
            entries = dict.fromkeys(("tokens", "bounds", "piece_bounds"), i64)
            yield AotCase(
                f"{kernel_name} {name} sums={sums}{' total' * total} {tiles.sizes(tile)}",
                kernel,
                entries
                | others
                | {argument: (kind,) * sums for argument, kind in each.items()}
                | (dict.fromkeys(totals, "*fp32:16") if total else {}),
                {"PIECE": decode.PIECE, "BE": tile.rows}
                | ({} if total else dict.fromkeys(totals))
                | tile.constants(D, dtype),
                *(tile.num_warps, 1),
                {
                    "matrix": False,
                    "shared": shared,
                    "in_flight": tile.loads,
                    "registers": tiles.GATHER_REGISTERS,
                    "instructions": 1000 * sums,
                },
                architectures,
                tiles.GATHER_REGISTERS,
            )


def encode_cases() -> Iterator[AotCase]:
    """The kernels of the encode."""

    def each(kind: str, names: str) -> dict[str, str]:
        return dict.fromkeys(names.split(), kind)

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        keys = KEYS[dtype]
        floats, integers = f"*{name}:16", f"*i{dtype.itemsize * 8}:16"
        levels = {"INF": keys.inf, "TOP": keys.top}

        for tile in tiles.TILES["residual"].candidates("sm_90"):
            yield AotCase(
                f"residual {name} {tiles.sizes(tile)}",
                residual.residual_kernel,
                each(floats, "x prediction pre_bias out") | each("i32:16", "D s_x s_prediction"),
                {"BD": tile.columns},
                *(tile.num_warps, 1),
                {"loads_128": 3, "instructions": 300},
                ("sm_90",),
            )

        for tile in tiles.TILES["group_max"].candidates("sm_90"):
            yield AotCase(
                f"group_max {name} {tiles.sizes(tile)}",
                selection.group_max_kernel,
                each(integers, "scores best") | each("i32:16", "M groups s_scores"),
                {"GROUP": 32, "BM": tile.columns} | levels,
                *(tile.num_warps, 1),
                {
                    "loads_128": tile.columns * dtype.itemsize // (tile.num_warps * 512),
                    "instructions": 700,
                },
                ("sm_90",),
            )

        first, *others = tiles.TILES["select"].candidates("sm_90")
        every = ("sm_80", "sm_90", "sm_100")
        # By value: a selection by index is a part of it.
        for M, k, tile, maxima, architectures in (
            (8192, 32, first, False, ("sm_90",)),
            (65536, 64, first, False, every),
            (131072, 256, first, False, every),
            *((65536, 64, tile, tile.columns > 0, ("sm_90",)) for tile in others),
        ):
            layout = selection.selection_layout(M, k)
            assert layout is not None
            warps = selection.select_warps(layout, tile.keys_per_thread)
            strip = tile.columns * dtype.itemsize if maxima else 0
            yield AotCase(
                f"select {name}, M={M} k={k} {tiles.sizes(tile)}",
                selection.select_kernel,
                each(integers, "scores best acts")
                | each("*i64:16", "indices")
                | each("i32:16", "M groups s_scores k"),
                selection.select_constants(layout, tile, maxima=maxima, by_value=True)
                | levels
                | {"threshold": None, "n_active": None},
                *(warps, 3),
                {"loads_128": strip // (512 * warps), "instructions": 4000},
                architectures,
            )

        # Above thresholds; 256: room for a few times the 70 active latents of Gemma Scope.
        for M, max_active, architectures in (
            (1024, 16, ("sm_90",)),
            (16384, 256, every),
            (65536, 256, every),
        ):
            layout = selection.selection_layout(M, max_active)
            assert layout is not None
            tile = selection.threshold_tile(first, layout)
            warps = selection.select_warps(layout, tile.keys_per_thread)
            strip = tile.columns * dtype.itemsize
            yield AotCase(
                f"select above thresholds {name}, M={M} max_active={max_active}",
                selection.select_kernel,
                each(integers, "scores best acts threshold")
                | each("*i64:16", "indices")
                | each("*i32:16", "n_active")
                | each("i32:16", "M groups s_scores k"),
                selection.select_constants(layout, tile, maxima=True, by_value=True) | levels,
                *(warps, 3),
                {"loads_128": 2 * strip // (512 * warps), "instructions": 4000},
                architectures,
            )


def gemm_cases() -> Iterator[AotCase]:
    """The GEMM with group maxima, of as many latents as fill its tiles."""
    keys = KEYS[torch.bfloat16]
    for architecture in ("sm_80", "sm_90", "sm_100"):
        for tile in tiles.TILES["gemm_many_tokens_16bit"].candidates(architecture):
            if tile == tiles.LIBRARY_GEMM:
                continue
            if isinstance(tile, tiles.SpecialisedGemmTile):
                yield from specialised_gemm_cases(tile)
                continue
            kinds = dict.fromkeys(("bias", "scores"), "*bf16:16") | {"best": "*i16:16", "n": "i32"}
            kinds |= dict.fromkeys(("D", "M", "groups", "s_scores"), "i32:16")
            for name, rows in (("x", tile.tokens), ("weight", tile.latents)):
                block = f"tensordesc<bf16[{rows},{tile.dimensions}]>"
                kinds[name] = block if tile.descriptors else "*bf16:16"
            loads = (tile.tokens + tile.latents) * tile.dimensions // (tile.num_warps * 256)
            yield AotCase(
                f"gemm bf16 {tiles.sizes(tile)}",
                gemm.gemm_kernel,
                kinds,
                gemm.gemm_constants(tile, 65536, 32)
                | {"INF": keys.inf, "TOP": keys.top, "UPCAST": False},
                *(tile.num_warps, tile.num_stages),
                {
                    "matrix": True,
                    **({"tensor_loads": 2} if tile.descriptors else {"loads_128": loads}),
                    "instructions": 3000,
                },
                (architecture,),
            )


def specialised_gemm_cases(tile: tiles.SpecialisedGemmTile) -> Iterator[AotCase]:
    """The warp-specialised GEMM, which exists for two architectures. The registers are those that
    its warps divide among them: 12 warps on sm_90, 8 on sm_100."""
    registers = {"sm_90": 168, "sm_100": 255}[tile.device_class]
    for bias, M in ((True, 65536), (False, 65520)):  # of which the latter are no whole groups
        constants: dict[str, Any] = gemm_specialised.specialised_constants(
            tile, M, 32, torch.bfloat16
        )
        kinds = {"scores": "*bf16:16", "best": "*i16:16", "n": "i32"}
        if bias:
            kinds["bias"] = "*bf16:16"
        else:
            constants["bias"] = None
        kinds |= dict.fromkeys(("D", "M", "groups", "s_scores"), "i32:16")
        for name, rows in (("x", tile.tokens), ("weight", tile.latents)):
            layout = repr(gemm_specialised.shared_layout())
            kinds[name] = f"tensordesc<bf16[{rows}, {tile.dimensions}],{layout}>"
        yield AotCase(
            f"specialised gemm bf16 M={M} {tiles.sizes(tile)}",
            gemm_specialised.specialised_kernel(tile),
            kinds,
            constants,
            *(tile.num_warps, 3),
            {"matrix": True, "tensor_loads": 2, "registers": registers, "instructions": 3000},
            (tile.device_class,),
        )


def few_token_cases() -> Iterator[AotCase]:
    """The encoder's scores of few tokens: defaults on each architecture, in both layouts of the
    weight; alternatives, and rows of a length that allows no wide loads, on one."""
    M, aligned, odd = 65536, 2048, 999
    shapes = {"rows": ((M, aligned), (aligned, 1)), "columns": ((M, aligned), (1, M))}
    shapes |= {"odd rows": ((M, odd), (odd, 1))}
    for dtype, N, layout in itertools.product(
        (torch.bfloat16, torch.float32), (1, 2, encode_few.FEW_TOKENS), shapes
    ):
        table = tiles.TILES[encode_few.small_gemm_tile_name(dtype, N, *shapes[layout])]
        for architecture in ("sm_80", "sm_90", "sm_100"):
            default, *others = table.candidates(architecture)
            if layout == "odd rows" and architecture != "sm_90":
                continue
            if N == encode_few.FEW_TOKENS or (N == 1) == (layout == "rows"):
                yield few_token_case(default, dtype, N, layout, architecture)
            if layout == "rows" and architecture == "sm_90" and N != 1:
                for tile in others:
                    yield few_token_case(tile, dtype, N, layout, architecture)


def few_token_case(tile, dtype: torch.dtype, N: int, layout: str, architecture: str) -> AotCase:
    kernel = encode_few.small_gemm_variant(tile)
    constants = encode_few.small_gemm_constants(tile, N, 32, dtype) | {"n_candidates": None}
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    floats, integers = f"*{name}:16", f"*i{dtype.itemsize * 8}:16"
    width = "i32" if layout == "odd rows" else "i32:16"
    signature = dict.fromkeys(("x", "weight", "bias"), floats)
    signature |= dict.fromkeys(("scores", "best"), integers) | {"n": "i32", "D": width}
    signature |= dict.fromkeys(("M", "groups", "s_scores"), "i32:16") | {"s_x": width}
    if tile.residual_launch:
        constants |= {"prediction": None, "pre_bias": None, "s_prediction": 0}
    else:
        signature |= {"prediction": floats, "pre_bias": floats, "s_prediction": width}
    strides = ["s_latent", "s_dimension"]
    constants[strides.pop(0 if layout == "columns" else 1)] = 1
    signature[strides[0]] = "i32:16" if layout == "columns" else width
    # Elements loaded one by one need an address each.
    bounds = (2500, 224) if layout == "odd rows" else (1600, 192)
    expect: dict[str, int | bool] = dict(zip(("instructions", "registers"), bounds, strict=True))
    loads = constants["BL"] * constants["BK"] * dtype.itemsize // (tile.num_warps * 512)
    expect |= {"loads_128": 0 if layout == "odd rows" else loads, "matrix": False}
    if isinstance(tile, tiles.SmallGemmTile):
        # The loads stand ahead of the loop and in it. ieee: no matrix instruction is that precise.
        expect["loads_128"] *= tile.num_stages
        expect["matrix"] = dtype != torch.float32 or tile.precision != "ieee"
        if dtype == torch.float32 and tile.precision == "tf32x3" and architecture == "sm_90":
            # Factors are split, and each step's product is added to the sum: not by the tensor
            # cores, which do not round. The last term is the bias.
            BL, BK, BN = tile.latents, tile.dimensions, encode_few.FEW_TOKENS
            expect["additions"] = (BL * BK + BK * BN + 2 * BL * BN) // (32 * tile.num_warps)
    return AotCase(
        f"{kernel.__name__.removesuffix('_kernel')} {name} N={N} {layout} {tiles.sizes(tile)}",
        kernel,
        signature,
        constants,
        *(tile.num_warps, tile.num_stages),
        expect,
        (architecture,),
    )


def step_cases() -> Iterator[AotCase]:
    """The kernels of the online step."""
    k = 64
    for name, dtype, M, D in (
        ("bf16", torch.bfloat16, 65536, 2048),
        ("bf16", torch.bfloat16, 131072, 3584),
        ("fp32", torch.float32, 65536, 2048),
    ):
        layout = selection.selection_layout(M, k)
        assert layout is not None
        warps = selection.select_warps(layout)
        floats, integers = f"*{name}:16", f"*i{dtype.itemsize * 8}:16"

        def each(kind: str, names: str) -> dict[str, str]:
            return dict.fromkeys(names.split(), kind)

        yield AotCase(
            f"select_decode {name}, M={M} k={k} D={D}",
            step.select_decode_kernel,
            each(floats, "x_hat acts W_dec b_dec prediction")
            | each(integers, "keys scores best")
            | each("*i64:16", "indices")
            | each("i32:16", "M groups s_scores k"),
            step.select_decode_constants(layout, D, dtype),
            *(warps, 1),
            {
                "matrix": False,
                "loads_128": step.ROWS * step.SLICE_BYTES // (warps * 512),
                "instructions": 4000,
            },
            register_budget=step.REGISTERS,
        )


def screening_cases() -> Iterator[AotCase]:
    """The kernels of the screened encode, and the GEMMs of its exact path."""
    every, one = ("sm_80", "sm_90", "sm_100"), ("sm_90",)

    def each(kind: str, names: str) -> dict[str, str]:
        return dict.fromkeys(names.split(), kind)

    for D in (2048, 3584):
        yield AotCase(
            f"quantise bf16 D={D}",
            screening.quantise_kernel,
            each("*bf16:16", "x prediction pre_bias rest")
            | each("*fp32:16", "dither facts")
            | each("*i8:16", "levels")
            | each("*i32:16", "n_candidates")
            | each("i32:16", "D padded s_x s_prediction"),
            screening.quantise_constants(D),
            *(screening.quantise_warps(D), 3),
            {"matrix": False, "loads_128": 3, "registers": 128, "instructions": 1500},
            one,
        )
    for tile, architecture, above in itertools.product(
        tiles.TILES["screen"].candidates("other"), every, (False, True)
    ):
        loads = tile.latents * tile.dimensions // (tile.num_warps * 512)
        yield AotCase(
            f"screen bf16{' above' * above} {tiles.sizes(tile)}",
            screening.screen_kernel,
            each("*i8:16", "levels q")
            | each("*bf16:16", "bias threshold" if above else "bias")
            | each("*fp32:16", "terms facts")
            | each("*i32:16", "upper best")
            | each("i32", "n")
            | each("i32:16", "padded M groups s_upper"),
            screening.screen_constants(tile, 32) | ({} if above else {"threshold": None}),
            *(tile.num_warps, tile.num_stages),
            {
                "matrix": True,
                "loads_128": loads * tile.num_stages,
                "registers": 128,
                "instructions": 2000,
            },
            (architecture,),
        )
    for name, dtype, M, D, k, room, architectures in (
        ("bf16", torch.bfloat16, 65536, 2048, 64, 256, every),
        ("bf16 certain", torch.bfloat16, 131072, 3584, 64, 8192, one),
        ("fp32", torch.float32, 65536, 2048, 64, 256, one),
    ):
        layout = selection.selection_layout(M, k)
        assert layout is not None
        warps = selection.select_warps(layout)
        floats, integers = f"*{name.split()[0]}:16", f"*i{dtype.itemsize * 8}:16"
        for above in (False, True):
            yield AotCase(
                f"pick {name}{' above' * above}, M={M} k={k}",
                screening.pick_kernel,
                each("*i32:16", "upper best picked n_candidates")
                | each("i32", "n")
                | each("i32:16", "M groups s_upper k"),
                screening.pick_constants(layout, room, dtype, not above),
                *(warps, 3),
                {"matrix": False, "registers": 128, "instructions": 2500},
                architectures,
            )
        row_bytes = screening.RESCORED_ROWS * screening.RESCORED_BYTES
        yield AotCase(
            f"rescore {name}, M={M} D={D}",
            screening.rescore_kernel,
            each(floats, "rest weight bias found")
            | each("*fp32:16", "terms facts")
            | each("*i32:16", "upper picked n_candidates")
            | each("i32:16", "M s_upper s_latent"),
            screening.rescore_constants(room, D, dtype) | {"s_dimension": 1},
            *(2, 1),
            {
                "matrix": False,
                "loads_128": row_bytes // (2 * 512),
                "registers": 128,
                "instructions": 1500,
            },
            architectures,
        )
        for above in (False, True):
            constants = screening.select_screened_constants(
                layout, room, dtype, by_value=True, above=above
            )
            signature = (
                each("*i32:16", "picked n_candidates")
                | each(integers, "found scores best acts")
                | each("*i64:16", "indices")
                | each("i32:16", "M groups s_scores k")
            )
            if above:
                signature |= each(integers, "threshold") | each("*i32:16", "n_active")
            else:
                constants |= {"threshold": None, "n_active": None}
            yield AotCase(
                f"select_screened {name}{' above' * above}, M={M} k={k}",
                screening.select_screened_kernel,
                signature,
                constants,
                *(warps, 3),
                {"matrix": False, "instructions": 6000 if above else 5000},
                architectures,
            )
    for N, architecture in itertools.product((1, encode_few.FEW_TOKENS), every):
        name = encode_few.small_gemm_tile_name(torch.bfloat16, N, (65536, 2048), (2048, 1))
        tile = tiles.TILES[name].of(architecture).tile
        case = few_token_case(tile, torch.bfloat16, N, "rows", architecture)
        offsets = {"prediction": None, "pre_bias": None, "s_prediction": 0}
        signature = {n: kind for n, kind in case.signature.items() if n not in offsets}
        constants = {n: c for n, c in case.constexprs.items() if n != "n_candidates"} | offsets
        yield case._replace(
            name=f"exact {case.name}",
            signature=signature | {"n_candidates": "*i32:16"},
            constexprs=constants,
        )
