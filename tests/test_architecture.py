"""The direction of imports between packages, instant help, and what README links to."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import SpaceHardware

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "app.py", *sorted((ROOT / "biasdpo").rglob("*.py")), *sorted((ROOT / "training").rglob("*.py"))]

# Packages from left to right: a module imports from its own level or from a level to its left.
LEVELS = [
    {"errors", "records", "config", "workspace"},
    {"model_files", "chat", "models", "model_card", "counterfactuals", "rewards", "hub"},
    {"data", "benchmarks", "gguf", "backends", "prompts", "lens", "evaluation.stats"},
    {"engines", "compare", "links", "evaluation", "jobs", "labeling", "gguf.export", "gguf.proof", "migrations", "backup"}
    | {"publish", "learned"},
    {"ui", "cli", "cli_jobs", "cli_options"},
    {"__main__"},
]
# Libraries that take seconds to import, and who may import them.
HEAVY = {
    "gradio": ("biasdpo/ui/", "app.py"),
    "torch": ("biasdpo/backends/hf", "biasdpo/gguf/", "training/"),
    "transformers": ("biasdpo/backends/hf", "biasdpo/gguf/to_hf", "biasdpo/chat", "training/"),
    "peft": ("biasdpo/backends/hf", "training/"),
    "trl": ("training/",),
    "spaces": ("biasdpo/backends/zerogpu",),
    "llama_cpp": ("biasdpo/backends/llamacpp", "biasdpo/gguf/"),
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            files = {m for m in modules if (ROOT / m.replace(".", "/")).with_suffix(".py").is_file()}
            found |= files if files == modules else files | {node.module}
    return found


def level(module: str) -> int | None:
    """The level of `package.module` or, where that has none of its own, of `package`."""
    parts = module.split(".")
    for name in (".".join(parts[:2]), parts[0]):
        for i, names in enumerate(LEVELS):
            if name in names:
                return i
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_left(path):
    name = str(path.relative_to(ROOT))
    own = ".".join(path.relative_to(ROOT / "biasdpo").with_suffix("").parts) if name.startswith("biasdpo/") else None
    for module in imports(path):
        package, _, rest = module.partition(".")
        if package in HEAVY:
            assert name.startswith(HEAVY[package]), f"{name} imports {package}"
        assert package != "training" or name.startswith("training/"), f"{name} imports training"
        if package == "biasdpo" and own and level(own) is not None and level(rest) is not None:
            assert level(rest) <= level(own), f"{name} imports {module}, which is to its right"


def test_no_import_cycle():
    modules = {str(p.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): p for p in SOURCES}
    graph = {name: {m for m in imports(path) if m in modules} - {name} for name, path in modules.items()}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"import cycle among {sorted(graph)}"


@pytest.mark.parametrize("arguments", [["--help"], ["models"], ["models", "--json"]])
def test_light_commands_import_nothing_heavy(arguments, tmp_path):
    script = (
        "import sys; from biasdpo.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'gradio', 'transformers', 'llama_cpp', 'peft', 'trl', 'datasets', 'matplotlib', 'sklearn'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    workspace = ["--workspace", str(tmp_path)] if arguments[0] == "models" else []
    command = [sys.executable, "-c", script, *arguments, *workspace]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.endswith("HEAVY []\n")


def test_the_front_matter_of_a_space_agrees_with_the_pins():
    front = yaml.safe_load((ROOT / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE))
    assert (front["sdk"], front["sdk_version"], front["hf_oauth"]) == ("gradio", pins["gradio"], True)
    assert (ROOT / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60
    assert front["suggested_hardware"] in [one.value for one in SpaceHardware]
    # ZeroGPU: these Pythons, torch from 2.8 on
    assert front["python_version"] in ("3.10.13", "3.12.12")
    assert f"FROM python:{front['python_version'].rpartition('.')[0]}-slim" in (ROOT / "Dockerfile").read_text()
    assert tuple(map(int, pins["torch"].split(".")[:2])) >= (2, 8)


def test_every_local_link_of_readme_leads_somewhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)\)", readme) if "://" not in t]
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []
