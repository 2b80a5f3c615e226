"""Build of the extensions `cocoop_fast._C` (C++) and `cocoop_fast._cuda` (CUDA C++), and the list of packages. All other
metadata is in pyproject.toml.

Without a working compiler the install succeeds and says in one line that the torch operations will be used, and without
nvcc that on a GPU the Triton kernels will be (pip shows these lines with -v).

Environment:
    COCOOP_FAST_NO_EXT=1        build no extension
    COCOOP_FAST_REQUIRE_EXT=1   a C++ extension that cannot be built is an error
    COCOOP_FAST_CUDA=0 or 1     do not build the CUDA extension; or one that cannot be built is an error
    CXX, CXXFLAGS, LDFLAGS, CUDACXX, CUDA_HOME     as everywhere
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

# Hidden visibility is what pybind11 asks for. No -ffast-math: results are compared with other backends'.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]

# A source written for one instruction set says so at the end of its name: <op>_avx2.cpp. It gets these flags where the
# compiler takes them and then defines this macro, and is left out elsewhere. All sources see COCOOP_FAST_HAVE_AVX2 and
# so on for the sets that are built; cpu_features() tells at run time which of them this machine can execute.
INSTRUCTION_SETS = {
    "_avx2": (["-mavx2", "-mfma"], "__AVX2__"),
    "_avx512": (
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
        "__AVX512F__",
    ),
    "_neon": ([], "__aarch64__"),  # the 64-bit ARM, which always has it; Apple's compiler too defines this
}


CUDA_EXTENSION = "cocoop_fast._cuda"


class NotBuilt(Exception):
    """Why the extension was not built."""


class BuildExtension(build_ext):
    """Compiles the sources in parallel: of C++ each with the flags that its name asks for, of CUDA with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        # Whatever an earlier build left here must not be packaged in place of what fails now.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        cuda = ext.name == CUDA_EXTENSION
        what = "CUDA" if cuda else "C++"
        build = self.compile_and_link_cuda if cuda else self.compile_and_link
        required = "COCOOP_FAST_CUDA" if cuda else "COCOOP_FAST_REQUIRE_EXT"
        try:
            if is_set("COCOOP_FAST_NO_EXT"):
                raise NotBuilt("COCOOP_FAST_NO_EXT is set")
            build(ext)
        except NotBuilt as reason:
            outcome = f"cocoop_fast: the {what} extension was not built ({reason})"
            if is_set(required):
                raise SystemExit(f"{outcome}, and {required} is set") from reason
            instead = "on a GPU the Triton kernels" if cuda else "the torch operations"
            say(f"{outcome}; {instead} will be used")

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:  # the same for an editable install
            Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def compile_and_link(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            raise NotBuilt("pybind11 is not installed") from None
        if self.compiler.compiler_type != "unix":
            raise NotBuilt(f"it needs GCC or Clang, not {self.compiler.compiler_type}")

        # Ask the compiler what it can do first, so that a missing one is told from an error in our sources.
        if problem := self.problem_compiling("int probe;", FLAGS):
            raise NotBuilt(f"no working C++17 compiler: {problem}")
        python_headers = [f"-I{folder}" for folder in self.compiler.include_dirs]
        if problem := self.problem_compiling("#include <Python.h>", FLAGS + python_headers):
            raise NotBuilt(f"Python's headers are missing, install python3-dev: {problem}")
        openmp = [] if self.problem_compiling("#include <omp.h>", ["-fopenmp"]) else ["-fopenmp"]

        flags_of_set = {}
        for suffix, (flags, macro) in INSTRUCTION_SETS.items():
            if not self.problem_compiling(f"#ifndef {macro}\n#error not this architecture\n#endif", flags):
                flags_of_set[suffix] = flags

        def compile_one(source: str) -> list[str]:
            suffix = instruction_set(source)
            if suffix and suffix not in flags_of_set:
                return []
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=[(f"COCOOP_FAST_HAVE{suffix.upper()}", "1") for suffix in flags_of_set],
                include_dirs=["csrc", pybind11.get_include()],
                extra_postargs=FLAGS + openmp + (flags_of_set[suffix] if suffix else []),
            )

        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # each thread waits for one compiler process
                objects = [path for paths in pool.map(compile_one, ext.sources) for path in paths]
            self.compiler.link_shared_object(
                objects, self.get_ext_fullpath(ext.name), extra_postargs=openmp, target_lang="c++"
            )
        except Exception as error:  # setuptools moves its CompileError and LinkError around
            raise NotBuilt(f"{error}; see the compiler's messages above") from error

    def compile_and_link_cuda(self, ext: Extension) -> None:
        if os.environ.get("COCOOP_FAST_CUDA") == "0":
            raise NotBuilt("COCOOP_FAST_CUDA is 0")
        try:
            import pybind11
        except ImportError:
            raise NotBuilt("pybind11 is not installed") from None
        toolkit = runpy.run_path("csrc/cuda/nvcc.py")
        nvcc = toolkit["find_nvcc"]()
        if nvcc is None:
            raise NotBuilt(
                "no nvcc: the CUDA toolkit is not installed, or neither CUDA_HOME nor PATH leads to it"
            )

        def run(*arguments: str) -> None:
            command = [nvcc, "-ccbin", self.compiler.compiler_so_cxx[0], *arguments]
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise NotBuilt(f"{error}; see the compiler's messages above") from error

        try:
            architectures = toolkit["architectures_of"](nvcc)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NotBuilt(f"nvcc does not work: {error}") from error
        if not architectures:
            raise NotBuilt(f"{nvcc} compiles for none of {toolkit['ARCHITECTURES']}")
        headers = ["-Icsrc", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        built_for = " ".join(map(str, architectures))
        start = time.monotonic()

        def compile_one(source: str) -> str:
            target = Path(self.build_temp, "cuda", Path(source).stem + ".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = [*toolkit["FLAGS"], *headers]
            if source.endswith(".cu"):
                flags += ["--threads", "0", *toolkit["code_flags"](architectures)]
            else:
                flags += [f"-DCOCOOP_FAST_CUDA_ARCHITECTURES={built_for}"]
            run(*flags, "-c", source, "-o", str(target))
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        run("-shared", "--cudart", "static", *objects, "-o", str(library))
        say(
            f"cocoop_fast: the CUDA extension was built for compute capabilities {built_for} (PTX for later ones) "
            f"in {time.monotonic() - start:.0f} s"
        )

    def problem_compiling(self, code: str, flags: list[str]) -> str | None:
        """What the compiler says against `code` compiled and linked with `flags`; None if it succeeds."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(code + "\n")
            command = [
                *self.compiler.compiler_so_cxx,
                *flags,
                str(source),
                "-shared",
                "-o",
                f"{folder}/probe.so",
            ]
            try:
                result = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                return f"{command[0]}: {error.strerror}"
        if result.returncode == 0:
            return None
        lines = result.stderr.splitlines() or [f"{command[0]} exited with status {result.returncode}"]
        return next((line for line in lines if "error" in line), lines[0])


def instruction_set(source: str) -> str | None:
    """The key of INSTRUCTION_SETS that a source's name ends with; None for a portable source."""
    return next((suffix for suffix in INSTRUCTION_SETS if Path(source).stem.endswith(suffix)), None)


class EditableWheel(editable_wheel):
    """An editable install by a plain path, which type checkers and editors follow; they do not follow an import hook.

    The path is that of a folder which holds a link to the package and nothing else: on the path of this folder,
    kernels/ would be found as a package of its own. Where there can be no links it is the hook.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        try:
            Path(".editable").mkdir(exist_ok=True)
            for link, target in {
                ".editable/cocoop_fast": "cocoop_fast",
                "cocoop_fast/kernels": "kernels",
            }.items():
                if not Path(link).is_dir():
                    Path(link).unlink(missing_ok=True)  # in an archive without links it is a file
                    Path(link).symlink_to(Path("..", target), target_is_directory=True)
        except OSError as error:
            say(
                f"cocoop_fast: no link for an editable install ({error}); type checkers will not find the package"
            )
        else:
            self.package_dir = self.distribution.package_dir = {"": ".editable"}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


cuda_sources = sorted(str(path) for suffix in ("cu", "cpp") for path in Path("csrc/cuda").glob(f"*.{suffix}"))

setup(
    # kernels/ has its own folder beside csrc/, but PyPI has another package of that name: ours is cocoop_fast.kernels.
    # There, in a checkout, a link leads to it.
    packages=[
        *find_packages(include=["cocoop_fast", "cocoop_fast.*"], exclude=["*.kernels", "*.kernels.*"]),
        *(f"cocoop_fast.{name}" for name in find_packages(include=["kernels", "kernels.*"])),
    ],
    package_dir={"cocoop_fast.kernels": "kernels"},
    # Optional: an editable install then accepts that one is not there.
    ext_modules=[
        Extension(
            "cocoop_fast._C",
            sources=["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))],
            language="c++",
            optional=True,
        ),
        *([Extension(CUDA_EXTENSION, cuda_sources, language="c++", optional=True)] if cuda_sources else []),
    ],
    cmdclass={"build_ext": BuildExtension, "editable_wheel": EditableWheel},
)
