"""The layout keeps its rules: few doors, few rooms in a folder, imports that only run downwards, no circle."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("sayo", "tools", "data")


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    files = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports() -> dict[str, set[str]]:
    """Modules of the product that each one imports, wherever in the file the import stands."""
    known, found = modules(), {}
    for name, path in known.items():
        asked = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                asked |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                asked |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        found[name] = (asked & known.keys()) - {name} - set(FOLDERS)
    return found


def test_the_root_has_six_modules_and_a_folder_at_most_eight_rooms():
    assert {path.stem for path in ROOT.glob("*.py")} == {
        *("rollout", "reward", "train_rl", "evaluate", "visualize", "vlm")
    }
    for folder in {path.parent for path in modules().values()} - {ROOT}:
        rooms = {
            path.name
            for path in folder.iterdir()
            if (path.suffix == ".py" and path.stem != "__init__") or (path.is_dir() and any(path.rglob("*.py")))
        }
        assert len(rooms) <= 8, f"{folder.relative_to(ROOT)} has {len(rooms)} rooms: {sorted(rooms)}"


def test_imports_run_downwards():
    for name, targets in imports().items():
        home = name.partition(".")[0]
        for target in targets:
            above = target.partition(".")[0]
            if home == "sayo":
                assert above == "sayo", f"{name} imports {target}, which stands above sayo/"
            if above in ("tools", "data"):
                assert home in ("tools", "data"), f"{name} imports {target}: only tools and data may"


def test_there_is_no_circle():
    edges, done = imports(), set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in edges[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_a_script_imports_nothing_slow_before_it_has_read_its_flags():
    """`--help` and a misspelt flag took 1.7 times the processor time of `import torch`, and 3 times at their worst."""
    slow = ("transformers", "peft", "datasets", "matplotlib", "scipy", "bitsandbytes", "torch._dynamo")
    for script in sorted(path.stem for path in ROOT.glob("*.py")):
        code = f"import sys, {script}; print(*(name for name in {slow} if name in sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert (done.stdout.split(), done.returncode) == ([], 0), f"{script}: {done.stdout}{done.stderr}"
