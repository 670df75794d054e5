"""The project's own promises: who imports whom, how long things may get, and that its documents tell the truth."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "speca"
SOURCES = sorted(PACKAGE.rglob("*.py"))
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

LAYERS = (
    "errors", "config", "core", "calibration.file", "calibration.cache", "calibration.knowledge", "reports.costs",
    "reports.report", "sampler", "denoiser", "verified", "diffusers", "reports", "compare", "calibration", "engine",
    "zoo", "", "bench", "serve", "cluster", "cli",
)  # fmt: skip
"""Lowest first; a file imports from its own layer and from those before it. "" is `speca` itself, the public names.
Some files of a folder lie below the rest of it: what runs at every call reads and writes them."""

THIRD_PARTY = {  # what the lower layers may use besides the standard library; the longest matching name counts
    "speca.errors": set(),
    "speca.config": set(),
    "speca.core": {"torch", "numpy"},
    "speca.core.controller": set(),
    "speca.calibration.file": set(),
    "speca.calibration.cache": {"torch", "numpy", "platformdirs"},
    "speca.calibration.knowledge": {"numpy"},
    "speca.reports.costs": set(),
    "speca.reports.report": {"matplotlib"},
    "speca.sampler": {"torch", "numpy"},
    "speca.denoiser": {"torch", "numpy"},
}


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ imports
def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in SOURCES}
PACKAGES = {module_of(path) for path in SOURCES if path.stem == "__init__"}


def imports(module: str, source: str) -> Iterator[str]:
    """Absolute names of all modules that `source`, the text of `module`, imports anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            kept = parts[: len(parts) + (module in PACKAGES) - node.level] if node.level else []
            base = ".".join([*kept, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base


def layer(module: str) -> int:
    _, *parts = module.split(".")
    name = next((name for name in (".".join(parts[:2]), *parts[:1]) if name in LAYERS), None)
    assert name is not None, f"{module} has no place in LAYERS; say there who may import it"
    return LAYERS.index(name)


def wrong_imports(module: str, source: str) -> list[str]:
    """What `module` imports against the rules, in words."""
    found = set(imports(module, source))
    ours = {name for name in found if name.split(".")[0] == "speca"}
    wrong = [f"{module} imports {name}, which lies above it" for name in sorted(ours) if layer(name) > layer(module)]
    rule = max((key for key in THIRD_PARTY if f"{module}.".startswith(f"{key}.")), key=len, default=None)
    if rule is not None:
        foreign = {name.split(".")[0] for name in found - ours} - set(sys.stdlib_module_names) - THIRD_PARTY[rule]
        wrong += [f"{module} must not import {name}" for name in sorted(foreign)]
    if module == "speca.core.controller":  # what it imports must be free of torch as well
        wrong += [f"{module} must not import {n}" for n in sorted(ours - {"speca.config", "speca.errors"})]
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_imports_point_downward(path: Path) -> None:
    assert wrong_imports(module_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("speca.core.history", "from ..diffusers.enable import enable"),
        ("speca.core.history", "from speca import denoiser"),
        ("speca.core.history", "import speca"),
        ("speca.core.history", "def f():\n    import diffusers.hooks"),
        ("speca.core.controller", "import torch"),
        ("speca.core.controller", "from .history import History"),
        ("speca.config", "from .core.correction import polynomial"),
        ("speca.denoiser.player", "if True:\n    from ..verified.gate import Gate"),
        ("speca.denoiser.player", "from diffusers import DiffusionPipeline"),
        ("speca.verified.gate", "from ..diffusers.enable import enable"),
        ("speca.zoo", "from ..bench import pareto"),
        ("speca.reports", "from ..cli import main"),
        ("speca.denoiser.run", "from ..reports.measure import generate"),
        ("speca.denoiser.run", "from ..calibration.calibrate import calibrate"),
        ("speca", "from . import cli"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert wrong_imports(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("speca.core.history", "import math, torch\nfrom ..errors import ConfigError"),
        ("speca.core.controller", "from ..config import SpecaConfig"),
        ("speca.diffusers.enable", "import diffusers\nfrom ..core.correction import polynomial"),
        ("speca.cli", "import typer\nfrom speca import enable, zoo"),
    ],
)
def test_a_right_import_is_left_alone(module: str, source: str) -> None:
    assert wrong_imports(module, source) == []


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, wide and without colour."""
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    env = {name: value for name, value in env.items() if name not in ("FORCE_COLOR", "GITHUB_ACTIONS")}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_importing_speca_stays_light() -> None:
    heavy = ("diffusers", "transformers", "accelerate", "typer", "rich", "matplotlib", "PIL")
    done = python(f"import speca, sys; print(*(name for name in {heavy} if name in sys.modules))")
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr or "loaded by `import speca`: " + done.stdout


# ------------------------------------------------------------------------------------------------ size
@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 350
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body  # without options and what they mean
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= 50, f"the body of {node.name} has {lines} lines"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also not inside functions or for types alone."""
    graph = {m: {n for n in imports(m, p.read_text(encoding="utf-8")) if n in MODULES} for p in SOURCES
             for m in [module_of(p)]}  # fmt: skip
    left = {module: {n for n in found if n not in PACKAGES or graph[n]} for module, found in graph.items()}
    while free := {module for module, found in left.items() if not found & left.keys() - {module}}:
        left = {module: found for module, found in left.items() if module not in free}
    assert not left, f"a circle among {sorted(left)}"


# ------------------------------------------------------------------------------------------------ documents
def shell_lines(markdown: str) -> list[str]:
    """Lines of code that are not Python: fenced or indented blocks, and inline code."""
    lines, fence = [], None
    for line in markdown.splitlines():
        if line.lstrip().startswith("```"):
            fence = line.strip()[3:] or "sh" if fence is None else None
        elif fence is not None:
            lines += [line] if fence in ("sh", "bash", "console", "text") else []
        elif line.startswith("    "):
            lines.append(line)
        else:
            lines += re.findall(r"`([^`]+)`", line)
    return [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]


@functools.cache
def help_of(command: str) -> str:
    done = python("import sys; from speca.cli import main; sys.exit(main())", command, "--help")
    assert done.returncode == 0, f"speca {command} --help: {done.stdout[-500:]}{done.stderr[-500:]}"
    return done.stdout


@pytest.mark.parametrize("path", GUIDES, ids=names(GUIDES))
def test_every_command_in_the_guides_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE))
    for line in shell_lines(path.read_text(encoding="utf-8")):
        for target in re.findall(r"\bmake ([a-z]+)\b", line):
            assert target in targets, f"make {target}"
        for command, rest in re.findall(r"(?:^|[\s/])speca ([a-z]+)\b(.*)", line):
            for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", rest):
                assert re.search(rf"{option}\b(?!-)", help_of(command)), f"speca {command} {option}"
            assert help_of(command)


def test_the_readme_shows_both_commands_and_three_of_the_command_line() -> None:
    lines = "\n".join(shell_lines(text("README.md")))
    assert {"demo", "test"} <= set(re.findall(r"\bmake ([a-z]+)", lines))
    assert {"generate", "check", "models"} <= set(re.findall(r"\bspeca ([a-z]+)", lines))


def test_python_in_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers
    import torch

    import speca
    import tiny

    first, loop = re.findall(r"```python\n(.*?)```", text("README.md"), re.DOTALL)
    pipe = tiny.dit().pipe
    monkeypatch.setattr(diffusers.DiTPipeline, "from_pretrained", lambda name: pipe)
    told: dict[str, object] = {"print": lambda report: told.update(report=report)}
    exec(first, told)
    assert len(told["images"]) == len(told["report"].samples) == 2

    config = {**tiny.dit_transformer().config, "out_channels": 4}
    transformer = tiny.randomised(diffusers.DiTTransformer2DModel.from_config(config))
    own = dict(transformer=transformer, scheduler=diffusers.DDIMScheduler(), speca=speca)
    exec(loop, {**own, "latents": torch.randn(2, 4, 4, 4), "labels": torch.tensor([3, 7])})
    report = speca.report(transformer)
    assert [len(sample.decisions) for sample in report.samples] == [50, 50]
    assert not any("plainly" in note for note in report.notes)


def test_the_readme_lists_the_presets() -> None:
    from speca.config import PRESETS

    section = text("README.md").split("## Presets")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(PRESETS)


def test_the_readme_is_short_and_keeps_its_place_for_results() -> None:
    readme = text("README.md")
    assert len(readme.splitlines()) < 150
    assert readme.count("<!-- results:begin -->") == readme.count("<!-- results:end -->") == 1
    assert readme.index("<!-- results:begin -->") < readme.index("<!-- results:end -->")


@pytest.mark.parametrize("path", [*GUIDES, ROOT / "CHANGELOG.md"], ids=names([*GUIDES, ROOT / "CHANGELOG.md"]))
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (path.parent / target).exists()] == []


def test_structure_names_every_folder_in_the_order_of_imports() -> None:
    page = text("docs/structure.md")
    named = re.findall(r"^\| `(\w+)/` \|", page, re.MULTILINE)
    assert named == [name for name in LAYERS if (PACKAGE / name).is_dir() and name]
    drawing = page.split("```")[1]
    assert [name for name in named if f"{name}/" not in drawing] == ["zoo"], "the picture shows all but the models"
    for folder, files in re.findall(r"^\| `(\w+)/` \|.*\| (`.*`) \|$", page, re.MULTILINE):
        assert all((PACKAGE / folder / name).is_file() for name in re.findall(r"`([\w.]+)`", files)), folder


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_every_file_begins_with_what_it_is_for(path: Path) -> None:
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert len(said.split()) >= 3, "a module docstring"


# ------------------------------------------------------------------------------------------------ set-up
def test_one_version_everywhere() -> None:
    import yaml

    import speca

    (version,) = re.findall(r'^version = "([^"]+)"', text("pyproject.toml"), re.MULTILINE)
    assert version == speca.__version__ == str(yaml.safe_load(text("CITATION.cff"))["version"])


def test_credit_is_given() -> None:
    import yaml

    paper = yaml.safe_load(text("CITATION.cff"))["preferred-citation"]
    authors = [f"{a['given-names']} {a['family-names']}" for a in paper["authors"]]
    assert authors == [
        "Jiacheng Liu", "Chang Zou", "Yuanhuiyi Lyu", "Fei Ren", "Shaobo Wang", "Kaixin Li", "Linfeng Zhang",
    ]  # fmt: skip
    for name in ("NOTICE", "README.md"):
        flowing = " ".join(text(name).split())
        assert "2509.11628" in flowing
        assert [author for author in authors if author not in flowing] == []
    assert "Zalando" in text("NOTICE")
    assert "Apache License\n                           Version 2.0" in text("LICENSE")
    assert "## [Unreleased]" in text("CHANGELOG.md")


def test_nothing_asks_for_torchvision() -> None:
    asked = text("pyproject.toml").split("[project]")[1].split("[tool.")[0] + text("constraints.txt")
    asked = re.sub(r"#.*", "", asked)
    assert re.findall(r"torchvision|lpips|torch-fidelity|clean-fid|open.clip", asked) == []


def test_types_and_commands_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert importlib.util.find_spec("speca.cli") is not None
    assert 'speca = "speca.cli:main"' in text("pyproject.toml")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert re.search(r"^make test$", text(".ci/run"), re.MULTILINE)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("target", "last"), [("demo", "speca generate fashion-dit"), ("test", "-m pytest")])
def test_one_make_command_sets_up_and_runs(target: str, last: str, tmp_path: Path) -> None:
    command = ["make", "--dry-run", f"VENV={tmp_path / 'venv'}", target]
    plan = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    places = [plan.find(part) for part in ("-m venv", "--constraint constraints.txt torch", "--editable", last)]
    assert -1 not in places
    assert places == sorted(places)


MACHINE = re.compile(r"(?<![\w.~:/-])/(?:home|Users|root|work|opt|mnt)/\w|[A-Z]:\\+Users")


def test_a_path_of_a_machine_is_seen() -> None:
    assert MACHINE.search("open('" + "/".join(("", "home", "me", "x.py")) + "')")
    assert not MACHINE.search("recipes/_work/vae.pt and https://example.org/" + "/".join(("", "home", "x"))[1:])


def test_no_file_speaks_of_one_machine() -> None:
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.decode().split("\0")):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in data:
            found += [f"{name}: {match}" for match in MACHINE.findall(data.decode("utf-8", "replace"))]
    assert found == []


def test_the_readme_shows_what_was_measured() -> None:
    import results

    found = {m: json.loads(text(f"docs/results/ablation-{m}.json"))["rows"] for m in results.MODELS}
    table = results.table({model: {row["name"]: row for row in rows} for model, rows in found.items()})
    assert f"{results.BEGIN}\n{table}\n{results.END}" in text("README.md"), "run python recipes/results.py"
