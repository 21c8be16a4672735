"""The house: who may import whom, that help is instant, and that README says what is there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "app.py", *sorted((ROOT / "biasdpo").rglob("*.py")), *sorted((ROOT / "training").rglob("*.py"))]

# From left to right; a module imports from its own floor or from a floor to the left of it.
FLOORS = [
    {"errors", "records", "template", "workspace"},
    {"fitting", "gguf_header", "gguf_names", "kept", "modelfile", "models"},
    {
        "completions",
        "gguf_export",
        "dataset",
        "plots",
        "rewards",
        "run_checks",
        "run_config",
        "run_endings",
        "run_folder",
        "scores",
        "stats",
    },
    {"backends", "benchmarks", "counterfactuals", "prompts", "run_card", "run_data"},
    {"detached", "engines", "run_estimate", "run_queue", "run_state", "runs"},
    {"generating", "scoring"},
    {"compare", "evaluate", "export_measures", "export_proof", "export_strings", "label"},
    {"evaluations", "exports", "label_queue"},
    {"ui", "cli_train", "cli_evaluate", "cli_dataset", "cli_export"},
    {"__main__"},
]
HEAVY = {
    "gradio": ("biasdpo/ui/", "app.py"),
    "torch": ("biasdpo/backends/hf", "biasdpo/gguf_export", "training/"),
    "transformers": ("biasdpo/backends/hf", "biasdpo/backends/gguf_tokenizer", "training/"),
    "peft": ("biasdpo/backends/hf", "training/"),
    "trl": ("training/",),
    "llama_cpp": ("biasdpo/backends/llamacpp", "biasdpo/gguf_export"),
    "matplotlib": ("biasdpo/plots",),
    "profanity_check": ("biasdpo/benchmarks/toxicity",),
    "vaderSentiment": ("biasdpo/benchmarks/sentiment",),
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor(module: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if module in names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_file_imports_leftwards(path):
    name = str(path.relative_to(ROOT))
    for module in imports(path):
        package, _, rest = module.partition(".")
        if package in HEAVY:
            assert name.startswith(HEAVY[package]), f"{name} imports {package}"
        assert package != "training" or name.startswith("training/"), f"{name} imports training"
        own = path.relative_to(ROOT / "biasdpo").parts[0].removesuffix(".py") if name.startswith("biasdpo/") else None
        other = rest.split(".")[0]
        if package == "biasdpo" and own not in (None, "__init__") and any(other in names for names in FLOORS):
            assert floor(other) <= floor(own), f"{name} imports {module}, which stands to its right"


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


def test_readme_gives_every_file_a_line():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {name.split("/")[-1] for name in re.findall(r"`([^`\n]+)`", readme)}
    folders = ("biasdpo", "training", "tests", "assets")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".toml", ".jsonl", ".css", ".js")]
    missing = [
        p.name for p in files if p.name not in named and not p.name.startswith("__") and "data" not in p.relative_to(ROOT).parts
    ]
    assert missing == []


def test_readme_begins_with_the_front_matter_of_a_space():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    front = re.match(r"---\n(.*?)\n---\n", readme, flags=re.DOTALL)
    assert front is not None
    version = re.search(r"^gradio==(\S+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert version is not None
    for line in ("sdk: gradio", f"sdk_version: {version[1]}", "app_file: app.py"):
        assert line in front[1].split("\n")


def test_every_local_link_of_readme_leads_somewhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)\)", readme) if "://" not in t]
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []
