"""What an installation contains, and what it does where the C++ extension cannot be built.

Nothing here installs anything: setup.py runs in copies of the tree whose csrc/ is a few lines, so each build takes a
second. The CI script installs the real wheel in a new environment.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# An extension module in plain C: compiles in no time. {} holds what a test wants the compiler to check.
SMALL_MODULE = """
#include <Python.h>
{}
static PyModuleDef definition = {{PyModuleDef_HEAD_INIT, "_C"}};
PyMODINIT_FUNC PyInit__C() {{ return PyModule_Create(&definition); }}
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of what setup.py reads, with a small csrc/."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pybind11")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("cocoop_fast", "kernels"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    (tmp_path / "README.md").write_text("# cocoop_fast\n")
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/bindings.cpp").write_text(SMALL_MODULE.format(""))
    return tmp_path


def run_setup(tree, *arguments, **variables):
    """setup.py with these environment variables, and none of ours from outside."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COCOOP_FAST_")}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def built_extensions(tree):
    return list((tree / "cocoop_fast").glob("_C.*"))


def need_compiler(tree):
    result = run_setup(tree, "build_ext", "--inplace")
    if not built_extensions(tree):
        pytest.skip(f"no compiler here: {result.stderr.strip().splitlines()[-1]}")


def requirement_names(requirements):
    return {re.match(r"[\w.-]+", requirement).group().lower() for requirement in requirements}


def test_torch_is_no_build_requirement():
    """pip would install it a second time, only to build the extension."""
    assert requirement_names(PROJECT["build-system"]["requires"]) == {"setuptools", "pybind11"}
    assert "torch" in requirement_names(PROJECT["project"]["dependencies"])


def test_triton_is_left_to_torch():
    """Torch for GPUs asks for it, and without a GPU there is no use for its hundreds of megabytes."""
    assert "triton" not in requirement_names(PROJECT["project"]["dependencies"])


def test_installed_metadata_is_this_project():
    distribution = importlib.metadata.distribution("cocoop-fast")
    assert distribution.version == PROJECT["project"]["version"]
    commands = distribution.entry_points.select(group="console_scripts")
    assert {command.name: command.value for command in commands} == {"cocoop-fast": "cocoop_fast.cli:main"}


def test_the_public_names_are_spelled_out_and_all_there():
    import cocoop_fast

    assert set(cocoop_fast.__all__) == {*cocoop_fast._HOME, "__version__"}
    for name in cocoop_fast.__all__:
        assert getattr(cocoop_fast, name) is not None
        assert name in dir(cocoop_fast)
    assert cocoop_fast.__version__ == PROJECT["project"]["version"]
    with pytest.raises(AttributeError, match="no attribute 'coop'"):
        _ = cocoop_fast.coop


def test_importing_the_package_loads_no_torch():
    code = "import sys, cocoop_fast; cocoop_fast.__version__; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "False"


def test_the_files_that_services_read_are_yaml():
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(files) >= 5
    for file in files:
        assert yaml.safe_load(file.read_text(encoding="utf-8")), file


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["references"][0]["title"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_kernels_are_installed_inside_our_package(tmp_path):
    import cocoop_fast.kernels

    assert Path(cocoop_fast.kernels.__file__).parts[-2:] == ("kernels", "__init__.py")
    # From outside the repository, where the folder kernels/ is not in the current directory.
    code = (
        "import importlib.util as u; print(u.find_spec('cocoop_fast.kernels').name, u.find_spec('kernels'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["cocoop_fast.kernels", "None"]


@pytest.mark.parametrize("links", ["as in a checkout", "as in an archive without links"])
def test_an_editable_install_is_a_plain_path_to_our_package_alone(tree, links):
    """Type checkers and editors follow it; tests/first_hour.sh asks pyright."""
    if links == "as in an archive without links":
        (tree / "cocoop_fast/kernels").unlink()
        (tree / "cocoop_fast/kernels").write_text("../kernels")
    result = run_setup(tree, "editable_wheel", "--dist-dir", "dist", COCOOP_FAST_NO_EXT="1")
    assert result.returncode == 0, result.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    files = zipfile.ZipFile(wheel)
    (path,) = (name for name in files.namelist() if ".dist-info" not in name)
    assert path.endswith(".pth")
    (folder,) = files.read(path).decode().splitlines()
    assert [one.name for one in Path(folder).iterdir() if not one.name.endswith(".egg-info")] == [
        "cocoop_fast"
    ]
    found = Path(folder, "cocoop_fast/kernels/variants.py")
    assert found.resolve() == (tree / "kernels/variants.py").resolve()


def test_wheel_has_one_top_level_package_with_everything_in_it(tree):
    need_compiler(tree)
    (tree / "kernels/below").mkdir()
    (tree / "kernels/below/__init__.py").touch()
    (tree / "cocoop_fast/assets/below").mkdir(parents=True, exist_ok=True)
    (tree / "cocoop_fast/assets/below/weights.bin").touch()
    result = run_setup(tree, "bdist_wheel")
    assert result.returncode == 0, result.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"cocoop_fast"}
    for expected in ("py.typed", "__main__.py", "kernels/__init__.py", "kernels/below/__init__.py"):
        assert f"cocoop_fast/{expected}" in names
    assert "cocoop_fast/assets/below/weights.bin" in names
    assert any(name.startswith("cocoop_fast/_C.") for name in names)


@pytest.mark.parametrize(
    "variables, reason",
    [
        ({"COCOOP_FAST_NO_EXT": "1"}, "COCOOP_FAST_NO_EXT is set"),
        (
            {"CC": "/nonexistent/c++", "CXX": "/nonexistent/c++"},
            "no working C++17 compiler: /nonexistent/c++: No such file or directory",
        ),
    ],
)
def test_install_without_extension_succeeds_and_says_why(tree, variables, reason):
    result = run_setup(tree, "build_ext", "--inplace", **variables)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("cocoop_fast:")]
    assert said == [
        f"cocoop_fast: the C++ extension was not built ({reason}); the torch operations will be used"
    ]
    assert not built_extensions(tree)


def test_required_extension_that_cannot_be_built_is_an_error(tree):
    result = run_setup(
        tree,
        "build_ext",
        "--inplace",
        CC="/nonexistent/c++",
        CXX="/nonexistent/c++",
        COCOOP_FAST_REQUIRE_EXT="1",
    )
    assert result.returncode != 0
    assert "was not built (no working C++17 compiler" in result.stderr


def test_error_in_our_sources_is_reported_and_leaves_no_older_extension(tree):
    need_compiler(tree)
    assert built_extensions(tree)
    (tree / "csrc/cpu/broken.cpp").write_text("#error this source is broken\n")

    result = run_setup(tree, "build_ext", "--inplace")
    assert result.returncode == 0, result.stderr
    assert "this source is broken" in result.stderr  # the compiler's message, then ours
    assert re.search(
        r"^cocoop_fast: the C\+\+ extension was not built \(.*\); the torch", result.stderr, re.M
    )
    assert not built_extensions(tree)

    assert run_setup(tree, "build_ext", "--inplace", COCOOP_FAST_REQUIRE_EXT="1").returncode != 0


def test_name_of_a_source_chooses_its_instruction_set(tree):
    need_compiler(tree)
    # Each variant defines a function if it was compiled with its flags, and the portable file calls it if it is told
    # that the variant exists. Anything wrong is a compile or link error, or an undefined symbol at import.
    conditions = {
        "avx2": "__AVX2__ && __FMA__ && !__AVX512F__",
        "avx512": "__AVX512F__ && __AVX512BW__ && __AVX512DQ__ && __AVX512VL__",
        "neon": "__aarch64__ && __ARM_NEON",
    }
    for name, condition in conditions.items():
        (tree / f"csrc/cpu/op_{name}.cpp").write_text(
            f"#if {condition}\nint op_{name}() {{ return 1; }}\n#endif\n"
        )
    calls = "".join(
        f"int op_{name}();\n#ifdef COCOOP_FAST_HAVE_{name.upper()}\nint call_{name} = op_{name}();\n#endif\n"
        for name in conditions
    )
    portable = (
        "#if __AVX2__ || __AVX512F__\n#error the portable file has instructions beyond the baseline\n#endif\n"
    )
    (tree / "csrc/bindings.cpp").write_text(SMALL_MODULE.format(portable + calls))

    result = run_setup(tree, "build_ext", "--inplace", COCOOP_FAST_REQUIRE_EXT="1", CXXFLAGS="", CFLAGS="")
    assert result.returncode == 0, result.stderr
    (extension,) = built_extensions(tree)
    shutil.copy(extension, tree / "csrc")
    subprocess.run([sys.executable, "-c", "import _C"], cwd=tree / "csrc", check=True, timeout=60)
