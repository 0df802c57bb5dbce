"""Runs the tests of the compiled part for aarch64 on any machine: `make aarch64`.

Zig's Clang compiles the sources. The Unicorn emulator runs them inside this process, on this process's memory. PyTorch
and NumPy run natively. The run time says nothing about an ARM processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import unicorn
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from unicorn import arm64_const as registers

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("test_compiled.py", "test_compiled_two_view.py", "test_compiled_tracks.py", "test_compiled_transform.py")
FOLDER = "KPMATCH_AARCH64"  # environment variable with the folder of the libraries

PAGE = 1 << 12
SHARED = 1 << 20  # bytes that are mapped at a time: with thousands of small mappings the emulator takes minutes
LIBRARY, CALLS, CALLS_SIZE = 0x10000000, 0x8000000, 0x10000  # emulator addresses of the library and of its imports
BACK = CALLS + CALLS_SIZE - 16  # return address of the called functions
STACK = 32 << 20
RELATIVE, OF_SYMBOLS = 1027, (257, 1025, 1026)  # relocations: ELF for the ARM 64-bit Architecture
TRY_AGAIN = 11  # EAGAIN: the system cannot start another thread
WHOLE = (1 << 64) - 1


def double(bits: int) -> float:
    """Return the double in a 64-bit register."""
    return float(struct.unpack("<d", struct.pack("<Q", bits))[0])


def bits(number: float, kind: Any) -> int:
    """Return the register content for a double or a float."""
    if kind is ctypes.c_double:
        return int(struct.unpack("<Q", struct.pack("<d", number))[0])
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


class EmulatedLibrary:
    """A library for aarch64, called as ctypes calls one for this machine.

    Args:
        path: path of the library.
        functions: result type and argument types of each function.
    """

    def __init__(self, path: Path, functions: Mapping[str, tuple[Any, Sequence[Any]]]) -> None:
        self._types = functions
        self._emulator = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self._called: list[str] = []
        self._functions: dict[str, int] = {}
        self._load(path)
        enabled = self._read("CPACR_EL1") | 3 << 20  # enables floating point
        self._write("CPACR_EL1", enabled)
        self._stack = ctypes.create_string_buffer(STACK)
        self._emulator.hook_add(unicorn.UC_HOOK_MEM_UNMAPPED, self._share)
        self._emulator.hook_add(unicorn.UC_HOOK_CODE, self._answer, begin=CALLS, end=BACK - 1)

    def __getattr__(self, name: str) -> Any:
        if name not in self._functions:
            raise AttributeError(name)
        return lambda *arguments: self._call(name, arguments)

    def _read(self, register: str) -> int:
        return int(self._emulator.reg_read(getattr(registers, f"UC_ARM64_REG_{register}")))

    def _write(self, register: str, value: int) -> None:
        self._emulator.reg_write(getattr(registers, f"UC_ARM64_REG_{register}"), value)

    def _load(self, path: Path) -> None:
        with path.open("rb") as file:
            elf = ELFFile(file)
            segments = [each for each in elf.iter_segments() if each["p_type"] == "PT_LOAD"]
            self._end = LIBRARY + -(-max(each["p_vaddr"] + each["p_memsz"] for each in segments) // PAGE) * PAGE
            self._emulator.mem_map(LIBRARY, self._end - LIBRARY)
            self._emulator.mem_map(CALLS, CALLS_SIZE)
            for each in segments:
                self._emulator.mem_write(LIBRARY + each["p_vaddr"], each.data())
            table = elf.get_section_by_name(".dynsym")
            for symbol in table.iter_symbols():
                if symbol["st_shndx"] != "SHN_UNDEF":
                    self._functions[symbol.name] = LIBRARY + symbol["st_value"]
            for section in elf.iter_sections():
                if isinstance(section, RelocationSection):
                    for relocation in section.iter_relocations():
                        self._relocate(relocation, table)

    def _relocate(self, relocation: Any, table: Any) -> None:
        kind, addend = relocation["r_info_type"], relocation["r_addend"]
        if kind == RELATIVE:
            target = LIBRARY + addend
        else:
            assert kind in OF_SYMBOLS, f"relocation {kind}"
            name = table.get_symbol(relocation["r_info_sym"]).name
            if name in self._functions:
                target = self._functions[name] + addend
            else:
                target = CALLS + 16 * len(self._called)
                self._called.append(name)
        self._emulator.mem_write(LIBRARY + relocation["r_offset"], struct.pack("<Q", target))

    def _share(self, emulator: Any, access: int, address: int, size: int, value: int, data: Any) -> bool:
        """Map some of this process's memory into the emulator, at the same address."""
        for extent in (SHARED, PAGE):  # a single page if part of the larger area is already mapped
            place = address // extent * extent
            with contextlib.suppress(unicorn.UcError):
                emulator.mem_map_ptr(place, extent, unicorn.UC_PROT_ALL, place)
                return True
        return False

    def _answer(self, emulator: Any, address: int, size: int, data: Any) -> None:
        """Perform a call from the library to a system library."""
        name = self._called[(address - CALLS) // 16]
        x0, x1, x2 = (self._read(f"X{i}") for i in range(3))
        if name == "memset":
            ctypes.memset(x0, x1 & 0xFF, x2)
        elif name in ("memcpy", "memmove"):
            is_constant = LIBRARY <= x1 < self._end  # inside the emulated library; everything else is this process's
            source = bytes(self._emulator.mem_read(x1, x2)) if is_constant else ctypes.string_at(x1, x2)
            ctypes.memmove(x0, source, x2)
        elif name == "pthread_create":
            self._write("X0", TRY_AGAIN)
        elif name.startswith("pthread_"):
            self._write("X0", 0)
        elif name == "sincos":
            angle = double(self._read("D0"))
            ctypes.c_double.from_address(x0).value = math.sin(angle)
            ctypes.c_double.from_address(x1).value = math.cos(angle)
        elif name not in ("__cxa_finalize", "__gmon_start__"):
            result = getattr(math, name)(double(self._read("D0")))
            self._write("D0", bits(result, ctypes.c_double))
        self._write("PC", self._read("X30"))

    def _call(self, name: str, arguments: Sequence[Any]) -> Any:
        """Call a function of the library by the AArch64 procedure call standard.

        Eight integers and eight floating-point numbers go into registers, the other arguments onto the stack.
        """
        result, types = self._types.get(name, (ctypes.c_int, ()))
        integers, numbers = [], 0
        for kind, argument in zip(types, arguments):
            if kind in (ctypes.c_double, ctypes.c_float):
                self._write(f"D{numbers}", bits(argument, kind))
                numbers += 1
            elif isinstance(argument, ctypes.Structure):
                integers.append(ctypes.addressof(argument))
            elif isinstance(argument, np.ndarray):
                integers.append(argument.ctypes.data)
            else:
                integers.append(0 if argument is None else int(argument) & WHOLE)
        assert numbers <= 8
        for i, value in enumerate(integers[:8]):
            self._write(f"X{i}", value)
        top = (ctypes.addressof(self._stack) + STACK - PAGE) // 16 * 16 - 16 * len(integers)
        for i, value in enumerate(integers[8:]):
            ctypes.c_uint64.from_address(top + 8 * i).value = value
        self._write("SP", top)
        self._write("X30", BACK)
        self._emulator.emu_start(self._functions[name], BACK)
        if result is ctypes.c_double:
            return double(self._read("D0"))
        return None if result is None else result(self._read("X0")).value


def pytest_load_initial_conftests() -> None:
    """Make the package open the libraries for aarch64 instead of its own. This plugin runs before it is imported."""
    from kpmatch_ros.runtime import compiled_library

    opened = compiled_library.open_library

    def open_library(path: Path, version: int, functions: Any, instead: str) -> Any:
        if ROOT not in path.resolve().parents:  # a library that a test has built
            return opened(path, version, functions, instead)
        library = EmulatedLibrary(Path(os.environ[FOLDER], path.parent.name, path.name), functions)
        assert library.kpmatch_version() == version
        return library

    compiled_library.open_library = open_library


def main() -> int:
    """Compile the library as pip does, run the tests, and return the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        compiler = f"{sys.executable} -m ziglang cc -target aarch64-linux-gnu"
        build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", f"{folder}/temp"]
        subprocess.run(build, env={**os.environ, "CC": compiler}, cwd=ROOT, check=True)
        os.environ[FOLDER] = f"{folder}/kpmatch_ros"
        tests = [str(ROOT / "test" / name) for name in TESTS]
        return int(pytest.main(["-n", "0", "-q", "-p", "aarch64", *tests, *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
