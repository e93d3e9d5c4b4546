"""The house: imports go down its floors only, files stay short, a device needs no torch, the README tells the truth."""

from __future__ import annotations

import ast
import os
import re
import shlex
import statistics
import subprocess
import sys
import zipfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (
    {
        "errors",
        "admission",
        "cuda_device",
        "files",
        "fingerprints",
        "hardware",
        "heap",
        "kernels",
        "machine",
        "output",
        "precision",
        "profile",
        "rates",
        "reserved",
        "resident",
        "catalog",
        "chat",
        "peft_config",
        "evidence",
        "flags",
        "stranger",
    },
    {
        "aside",
        "attending",
        "conv1d",
        "backbone",
        "tasks",
        "anatomy",
        "data",
        "runtime",
        "cross_entropy",
        "divergence",
        "roofline",
        "surface",
        "ranks",
        "shards",
    },
    {"methods", "foreign", "placements", "stage", "step"},
    {
        "recipe",
        "candidate",
        "taxonomy",
        "schedule",
        "adapter",
        "answers",
        "evaluate",
        "checkpoint",
        "counts",
        "cuda_semantics",
        "allocator",
        "recall",
        "trace",
        "watch",
        "work",
        "events",
        "interop",
        "ledger",
    },
    {"workspace", "train", "launch", "largest", "merge", "export"},
    {"bring", "probe", "inferplan", "deploy", "report", "sharding", "whole"},
    {"replay"},
    {"extrapolate", "measure"},
    {"units"},
    {"traces"},
    {"plan"},
    {"planning", "planpage", "runplan", "tables", "alternatives"},
    {"plancommand", "pipeline"},
    {"worker", "cli"},
    {"__main__"},
)
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
FIRST_FLOOR_OF_STAGES = 4  # from here on, what stands on one floor does not know its neighbours
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "edgepeft").rglob("*.py"))
}
SOURCES = sorted(path for name in ("edgepeft", "tools", "tests", "benchmarks") for path in (ROOT / name).rglob("*.py"))


def unit(module: str) -> str:
    """The stage or package a module belongs to: ``edgepeft.methods.lora`` is in ``methods``; the root is in ''."""
    return (module.split(".") + [""])[1]


def imports(module: str, source: str) -> set[str]:
    """Everything ``module`` imports, anywhere in it, as full names; of edgepeft the file that is meant."""
    found = set()
    package = module if MODULES.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            submodules = {f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in MODULES}
            found |= submodules
            if len(submodules) < len(node.names):
                found.add(base)
    return found


IMPORTS = {module: imports(module, path.read_text(encoding="utf-8")) for module, path in MODULES.items()}
INSIDE = {module: {name for name in names if unit(name) and name in MODULES} for module, names in IMPORTS.items()}


def transgressions(inside: dict[str, set[str]]) -> list[str]:
    """Imports that go up, or sideways between stages."""
    found = []
    for module, names in inside.items():
        for name in sorted(names):
            if not {unit(module), unit(name)} <= FLOOR_OF.keys():
                continue  # the root imports nothing, and a unit without a floor has a test of its own
            own, other = FLOOR_OF[unit(module)], FLOOR_OF[unit(name)]
            if other > own:
                found.append(f"{module} (floor {own}) imports {name} (floor {other})")
            elif other == own >= FIRST_FLOOR_OF_STAGES and unit(module) != unit(name):
                found.append(f"{module} imports {name}, its neighbour on floor {own}")
    return found


def test_every_module_has_a_floor() -> None:
    homeless = {unit(module) for module in MODULES} - {""} - set(FLOOR_OF)
    assert not homeless, f"say in FLOORS where these stand: {sorted(homeless)}"


def test_imports_go_down() -> None:
    assert not transgressions(INSIDE)


def test_no_module_imports_itself_by_a_detour() -> None:
    try:
        TopologicalSorter(INSIDE).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_the_floors_test_sees_hidden_and_relative_imports() -> None:
    def inside(module: str, source: str) -> dict[str, set[str]]:
        return {module: {name for name in imports(module, source) if unit(name)}}

    hidden = "def f():\n    from edgepeft import errors\n    import edgepeft.export.onnx\n"
    assert transgressions(inside("edgepeft.step", hidden)) == [
        "edgepeft.step (floor 2) imports edgepeft.export.onnx (floor 4)"
    ]
    sideways = "from .export import onnx"
    assert transgressions(inside("edgepeft.train", sideways)) == [
        "edgepeft.train imports edgepeft.export.onnx, its neighbour on floor 4"
    ]
    assert not transgressions(
        inside("edgepeft.export.onnx", "from . import package\nfrom ..errors import EdgePeftError")
    )


def test_the_package_itself_imports_nothing() -> None:
    assert not {name for name in IMPORTS["edgepeft"] if name.split(".")[0] not in sys.stdlib_module_names}


def test_the_runtime_needs_onnxruntime_tokenizers_and_numpy_alone() -> None:
    reached, todo = set(), {module for module in MODULES if unit(module) == "runtime"}
    while todo:
        module = todo.pop()
        reached.add(module)
        todo |= INSIDE[module] - reached
    foreign = {
        (module, name)
        for module in reached
        for name in IMPORTS[module]
        if name.split(".")[0] not in {"edgepeft", "onnxruntime", "tokenizers", "numpy", *sys.stdlib_module_names}
    }
    assert not foreign


def test_files_are_short_and_named_for_one_purpose() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert not {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > 400}
    assert statistics.median(lines[path] for path in MODULES.values()) < 150
    assert not [path for path in SOURCES if path.stem in {"utils", "util", "helpers", "common", "misc"}]


def commands(text: str) -> list[list[str]]:
    """The commands in the fenced bash blocks of a Markdown text, split into words, comments left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


README = commands((ROOT / "README.md").read_text(encoding="utf-8"))


def test_the_readme_shows_the_two_commands() -> None:
    assert ["bash", "tools/demo.sh"] in README and ["bash", "tools/test.sh"] in README


@pytest.mark.parametrize("command", README, ids=" ".join)
def test_readme_command_exists(command: list[str]) -> None:
    match command:
        case ["bash", script]:
            subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
        case ["edgepeft", subcommand, *arguments]:
            told = run_python("-c", "from edgepeft.cli import main; main()", subcommand, "--help")
            assert not {flag for flag in arguments if flag.startswith("--")} - set(re.findall(r"--[\w-]+", told))
        case ["python", "-m", module, *_]:
            assert run_python("-m", module, "--help")
        case ["pip", "install", *what]:
            declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            assert not [name for name in what if not name.startswith("-") and f'"{name}' not in declared]
        case _:
            pytest.fail("nothing here knows how to check this command")


def run_python(*arguments: str) -> str:
    plain = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **plain}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_data_and_nothing_of_the_workshop(tmp_path: Path) -> None:
    run_python("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    data = {f"edgepeft/profiles/{path.name}" for path in (ROOT / "profiles").glob("*.toml")}
    data |= {f"edgepeft/catalog/{path.name}" for path in (ROOT / "edgepeft" / "catalog").glob("*.json")}
    assert data and data <= held
    assert {"edgepeft/py.typed", "edgepeft/report/page.html"} <= held
    assert {str(path.relative_to(ROOT)) for path in MODULES.values()} <= held
    assert not {name for name in held if not name.startswith(("edgepeft/", "edgepeft-"))}


def test_constraints_are_exact_and_free_of_local_builds() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert not [pin for pin in pins if not re.fullmatch(r"#.*|[\w.-]+==[\w.]+", pin)]
