"""Compile every kernel ahead of time, without a device, and read what the machine code shows.

The cases are those of `aot_cases.py`. Of each case, on each of its architectures: no
spills (stack, local memory), shared memory within the device's, and what its `expect` says:

    instructions   at most so many in the kernel: an unrolled loop that blew up is seen
    loads_128      at least so many 128-bit loads from global memory, to registers or shared memory
    in_flight      at least so many 128-bit loads to registers one after another before any of their
                   results is used: what hides the latency of memory where no other warp does
    tensor_loads   at least so many loads by the tensor memory accelerator
    additions      at least so many additions of fp32 that are no part of a product
    matrix         matrix instructions of this architecture's generation, or none where False
    registers      at most so many per thread
    shared         at most so many bytes of shared memory
    barriers       at most so many

It cannot see bank conflicts, caches, latency or races. Run it without TRITON_INTERPRET, which
takes the place of the compiler: `python tests/static_gate.py [name …]`, names select cases.
"""

import itertools
import re
import struct
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aot_cases

SHARED_BYTES = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448}
SHARED_BYTES |= {"sm_100": 232448}
SHARED_PER_MULTIPROCESSOR = {"sm_80": 167936, "sm_86": 102400, "sm_89": 102400, "sm_90": 233472}
SHARED_PER_MULTIPROCESSOR |= {"sm_100": 233472}
WARPS_PER_MULTIPROCESSOR = {"sm_86": 48, "sm_89": 48}  # others: 64
MATRIX = dict.fromkeys(("sm_80", "sm_86", "sm_89"), r"[HI]MMA") | {"sm_90": r"[HI]GMMA"}
MATRIX |= {"sm_100": r"(UTC\w*MMA|IMMA)"}  # IMMA: 8-bit products of Triton 3.6
BINARIES = {"sm_80": "SM80", "sm_86": "SM86", "sm_89": "SM89", "sm_90": "SM90a", "sm_100": "SM100a"}
"""Architectures that Triton compiles for, as the disassembler names them."""
SKIPPED = 77
"""Exit status where Triton or its tools are absent."""


class Compiled(NamedTuple):
    """A kernel of one architecture."""

    cubin: bytes
    shared: int
    """Bytes of shared memory."""
    seconds: float
    """Time that it took to compile."""


def tools() -> tuple[Path, Path]:
    """The disassemblers that Triton brings along."""
    try:
        import triton
    except ModuleNotFoundError:
        skip("Triton is not installed")
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = folder / "cuobjdump", folder / "nvdisasm"
    for tool in found:
        if not tool.exists():
            skip(f"{tool.name} is not among Triton's tools in {folder}")
    return found


def skip(reason: str):
    print(f"skipped: {reason}")
    raise SystemExit(SKIPPED)


def compiled(case, architecture: str):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from resae_kernels.triton import runtime

    kernel = case.kernel.load() if isinstance(case.kernel, runtime.Kernel) else case.kernel
    names = kernel.arg_names
    unknown = (set(case.signature) | set(case.constexprs)) - set(names)
    assert not unknown, f"{case.name}: no such argument: {unknown}"
    missing = set(names) - set(case.signature) - set(case.constexprs)
    assert not missing, f"{case.name}: neither in signature nor in constexprs: {missing}"
    attributes = {}

    def type_of(spec, path: tuple[int, ...]):
        if isinstance(spec, tuple):
            return tuple(type_of(part, (*path, i)) for i, part in enumerate(spec))
        kind, _, divisor = spec.partition(":")
        if divisor:
            attributes[path] = [["tt.divisibility", int(divisor)]]
        return kind

    signature = {
        name: type_of(case.signature.get(name, "constexpr"), (i,)) for i, name in enumerate(names)
    }
    source = ASTSource(kernel, signature, dict(case.constexprs), attributes)
    return triton.compile(
        source,
        target=GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32),
        options=runtime.launch_options(case.num_warps, case.num_stages, case.register_budget),
    )


def resources(cuobjdump: Path, cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and local memory, of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = output_of(cuobjdump, "-res-usage", file.name)
    return {
        name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)
    }


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def code_of(cubin: bytes) -> bytes:
    """The machine code of the one kernel in a cubin, an ELF file: its section `.text.NAME`."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    start_of_names = sections[names][4]
    (found,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", start_of_names + name)
    )
    return found


def machine_code(nvdisasm: Path, architecture: str, cubins: Sequence[bytes]) -> list[list[str]]:
    """Labels (`.L_x_1a0:`) and instructions of each kernel, in their order.

    All of an architecture at once, one after another in a file of code alone: the disassembler
    takes longer to start than for a kernel. In such a file it names the places that branches go to
    by their addresses.
    """
    codes = [code_of(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        # Its analysis of the flow of data takes a quarter of the time and prints nothing.
        text = output_of(nvdisasm, "--no-dataflow", "-b", BINARIES[architecture], file.name)
    # "/*0040*/  @!P0 LDG.E.128 R4, …": an address, perhaps a predicate, the operation.
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z].*?);", text)
    branch = re.compile(r"(BRA\b.*?)0x([0-9a-f]+)\s*$")
    targets = {int(match[2], 16) for _, line in found if (match := branch.match(line))}
    ends = list(itertools.accumulate(map(len, codes)))
    kernels: list[list[str]] = [[] for _ in codes]
    for place, line in found:
        address = int(place, 16)
        lines = kernels[bisect_right(ends, address)]
        if address in targets:
            lines.append(f".L_x_{address:x}:")
        lines.append(branch.sub(r"\1`(.L_x_\2)", line))
    assert all(kernels), "a kernel without an instruction in nvdisasm's output"
    return kernels


def loads_in_flight(lines: Sequence[str]) -> int:
    """The fewest, over the loops that multiply what they load, of the most 128-bit loads to
    registers that follow each other before one of their results is used; over all of the kernel
    where such loops are unrolled.

    `lines` as of `machine_code`.
    """
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    found: list[int] = []
    for end, line in enumerate(lines):
        target = re.match(r"BRA\b.*?(\.L_\w+)", line)
        if target and labels[target[1]] < end:
            body = lines[labels[target[1]] : end]
            most = _most_pending(body)
            if most and any(line.startswith(("FFMA", "FMUL")) for line in body):
                found.append(most)
    return min(found) if found else _most_pending(lines)


def _most_pending(lines: Iterable[str]) -> int:
    """The most results of 128-bit loads that are not used yet, at any place of `lines`."""
    most = 0
    pending: list[set[int]] = []
    for line in lines:
        operation, _, operands = line.partition(" ")
        named = [int(register) for register in re.findall(r"\bR(\d+)\b", operands)]
        wide = re.fullmatch(r"LDG\.E\.(?:\w+\.)*(128|256)(?:\.\w+)*", operation)
        used = set(named[1:] if wide else named)
        if any(result & used for result in pending):
            pending = []
        if wide:
            first, words = named[0], int(wide[1]) // 32
            pending += [set(range(first + i, first + i + 4)) for i in range(0, words, 4)]
            most = max(most, len(pending))
    return most


def count(pattern: str, code: str) -> int:
    return len(re.findall(rf"^{pattern}", code, re.MULTILINE))


def instructions(lines: Sequence[str]) -> int:
    """Instructions of a kernel; what follows its end is padding."""
    return sum(not line.endswith(":") and line.strip() != "NOP" for line in lines)


def failures(
    case, architecture: str, shared: int, used: dict[str, int], lines: Sequence[str]
) -> list[str]:
    """Sentences on what is wrong with a kernel; `used` as of `resources`."""
    code = "\n".join(line for line in lines if not line.endswith(":"))
    measured = {
        "instructions": instructions(lines),
        "registers": used["reg"],
        "shared": shared,
        "barriers": count(r"BAR\.", code),
        "loads_128": count(r"LDG(STS)?\.E\.(\w+\.)*128", code),
        "in_flight": loads_in_flight(lines),
        "tensor_loads": count(r"UTMALDG", code),
        "additions": count(r"FADD\b", code),
    }
    wrong = [f"{name} {used[name]}, expected 0" for name in ("stack", "local") if used[name] != 0]
    spills = count(r"(LDL|STL)\b", code)
    if spills:
        wrong.append(f"{spills} instructions on local memory, expected 0")
    if shared > SHARED_BYTES[architecture]:
        wrong.append(f"shared {shared}, {architecture} has {SHARED_BYTES[architecture]}")
    for name, bound in case.expect.items():
        if name == "matrix":
            matrix = count(MATRIX[architecture] if bound else r"\w*MMA", code)
            if bool(matrix) != bound:
                wanted = f"some {MATRIX[architecture]}" if bound else "none"
                wrong.append(f"{matrix} matrix instructions, expected {wanted}")
        elif name in ("loads_128", "in_flight", "tensor_loads", "additions"):
            if measured[name] < bound:
                wrong.append(f"{name} {measured[name]}, expected at least {bound}")
        elif measured[name] > bound:
            wrong.append(f"{name} {measured[name]}, expected at most {bound}")
    return wrong


def occupancy(architecture: str, registers: int, shared: int, num_warps: int) -> float:
    """Resident warps as a share of the most a multiprocessor holds."""
    most = WARPS_PER_MULTIPROCESSOR.get(architecture, 64)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * num_warps)
    by_shared = SHARED_PER_MULTIPROCESSOR[architecture] // (shared + 1024)
    return min(by_registers, by_shared, most // num_warps, 32) * num_warps / most


def main(names: list[str]) -> int:
    cuobjdump, nvdisasm = tools()
    # Two cases may name one kernel: it is compiled once.
    kernels: dict[str, dict[tuple[Any, ...], Compiled]] = {}
    chosen = []
    for case in aot_cases.all_cases():
        if not names or any(name in case.name for name in names):
            chosen.append(case)
            for architecture in case.architectures:
                made = kernels.setdefault(architecture, {})
                if case.key not in made:
                    start = time.perf_counter()
                    kernel = compiled(case, architecture)
                    seconds = time.perf_counter() - start
                    cubin = kernel.asm["cubin"]
                    made[case.key] = Compiled(cubin, kernel.metadata.shared, seconds)
    codes = {
        architecture: dict(zip(made, machine_code(nvdisasm, architecture, cubins), strict=True))
        for architecture, made in kernels.items()
        if (cubins := [kernel.cubin for kernel in made.values()])
    }
    print(
        f"{'kernel':<50} | {'arch':<6} | registers | shared | occupancy | instructions | "
        "in flight | compile s"
    )
    failed = 0
    for case in chosen:
        for architecture in case.architectures:
            cubin, shared, seconds = kernels[architecture][case.key]
            lines = codes[architecture][case.key]
            used = resources(cuobjdump, cubin)
            share = occupancy(architecture, used["reg"], shared, case.num_warps)
            print(
                f"{case.name:<50} | {architecture:<6} | {used['reg']:>9} | {shared:>6} | "
                f"{share:>9.0%} | {instructions(lines):>12} | {loads_in_flight(lines):>9} | "
                f"{seconds:>9.1f}"
            )
            for wrong in failures(case, architecture, shared, used, lines):
                failed += 1
                print(f"    FAILED {wrong}")
    print(f"{failed} failed" if failed else "all passed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
