"""Tests about the project itself: who may import whom, what the README promises, what the requirement files agree on.

Each import rule has a test of the test: a small tree that breaks the rule, and the sentence that says so.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "sentence_transformers"}
PAGE_ONLY = {"gradio", "plotly", "pandas", "components"}


# ── imports ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Rule:
    """The files that match `files` import nothing of `never`; of their own package only `only`, if that is given.

    `but` names what one file may import all the same.
    """

    files: str
    never: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    but: frozenset[tuple[str, str]] = frozenset()


# Deciders are given numbers: what they decide can be tested in closed form, and none of them can open a model.
DECIDERS = {"llm_merge.errors", "llm_merge.recipe"}
RULES = (
    # The one DataFrame of the library: who asks for it has pandas, and nobody else needs it.
    Rule(
        "llm_merge/**/*.py",
        never=frozenset(PAGE_ONLY | {"app"}),
        but=frozenset({("llm_merge/contribution_report.py", "pandas")}),
    ),
    *(Rule(f"llm_merge/{decider}.py", only=frozenset(DECIDERS)) for decider in ("weights", "contributions")),
    # Hi-Merging decides by contributions and the report of them, which are numbers, too.
    Rule(
        "llm_merge/hi_merging.py",
        only=frozenset(DECIDERS | {"llm_merge.contributions", "llm_merge.contribution_report"}),
    ),
    Rule("llm_merge/contribution_report.py", only=frozenset(DECIDERS | {"llm_merge.contributions"})),
    Rule("components/views/*.py", never=frozenset({"gradio"})),
    Rule("components/charts.py", never=frozenset({"gradio"})),
)


def broken_rules(root: Path, rules: tuple[Rule, ...] = RULES) -> list[str]:
    """One sentence for each import that breaks a rule."""
    sentences = []
    for rule in rules:
        for file in sorted(root.glob(rule.files)):
            for name in imports_of(file, root):
                if forbidden(name, rule) and (str(file.relative_to(root)), name) not in rule.but:
                    sentences.append(f"{file.relative_to(root)} imports {name}")
    return sentences


def forbidden(name: str, rule: Rule) -> bool:
    within = any(name == top or name.startswith(f"{top}.") for top in rule.never)
    own = name.startswith("llm_merge.") and rule.only is not None
    return within or (own and not any(name == top or name.startswith(f"{top}.") for top in rule.only or ()))


def imports_of(file: Path, root: Path, *, run_time_only: bool = False) -> set[str]:
    """Every module that a file imports, wherever in the file, and each with the names taken from it: `a.b`, `a.b.c`."""
    package = file.relative_to(root).parent.parts
    names: set[str] = set()
    for node in statements(ast.parse(file.read_text(encoding="utf-8")), run_time_only):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def statements(node: ast.AST, run_time_only: bool) -> Iterator[ast.AST]:
    """The node and all below it; without what stands under `if TYPE_CHECKING:` when only the run time counts."""
    yield node
    skipped = node.body if run_time_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) else []
    for child in ast.iter_child_nodes(node):
        if child not in skipped:
            yield from statements(child, run_time_only)


def import_cycle(root: Path, package: str) -> list[str]:
    """The modules of one import cycle in `package`, or nothing.

    The fronts of packages, `__init__`, are left out: a method may import from its front the registry that it joins.
    """
    files = {
        ".".join(file.relative_to(root).with_suffix("").parts): file
        for file in root.glob(f"{package}/**/*.py")
        if file.name != "__init__.py"
    }
    graph = {name: imports_of(file, root, run_time_only=True) & set(files) - {name} for name, file in files.items()}
    finished: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in finished:
            for other in sorted(graph[name]):
                if cycle := walk(other, [*path, name]):
                    return cycle
            finished.add(name)
        return []

    return next((cycle for name in sorted(graph) if (cycle := walk(name, []))), [])


def loaded_by(code: str, among: set[str]) -> set[str]:
    """Which packages of `among` are loaded after `code` ran in a Python of its own."""
    script = f"import sys\n{code}\nprint(*(set({sorted(among)!r}) & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_imports_go_downward() -> None:
    assert broken_rules(REPOSITORY) == []


@pytest.mark.parametrize("package", ["llm_merge", "components"])
def test_imports_do_not_go_round(package: str) -> None:
    assert import_cycle(REPOSITORY, package) == []


def test_importing_the_library_loads_nothing_heavy() -> None:
    assert loaded_by("import llm_merge", HEAVY | PAGE_ONLY) == set()


def test_importing_the_app_loads_no_model_library() -> None:
    assert loaded_by("import app", HEAVY) == set()


def test_the_reports_pandas_is_loaded_when_a_frame_is_asked_for() -> None:
    assert loaded_by("import llm_merge.contribution_report", HEAVY | PAGE_ONLY) == set()


def test_what_the_page_shows_is_decided_without_gradio() -> None:
    views = sorted((REPOSITORY / "components" / "views").glob("*.py"))
    modules = ["components.charts", *(f"components.views.{view.stem}" for view in views if view.stem != "__init__")]
    assert loaded_by(f"import {', '.join(modules)}", {"gradio"}) == set()


@pytest.mark.parametrize(
    ("path", "line", "sentence"),
    [
        ("llm_merge/plan.py", "import pandas as pd", "llm_merge/plan.py imports pandas"),
        ("llm_merge/cells.py", "from llm_merge import contribution_report\nimport pandas", "cells.py imports pandas"),
        ("llm_merge/hi_merging.py", "from .plan import make_plan", "hi_merging.py imports llm_merge.plan"),
        ("llm_merge/families/a.py", "def f():\n    from plotly import io", "llm_merge/families/a.py imports plotly"),
        ("llm_merge/weights.py", "from .checkpoint import Checkpoint", "weights.py imports llm_merge.checkpoint"),
        ("llm_merge/weights.py", "from llm_merge import plan", "weights.py imports llm_merge.plan"),
        ("components/charts.py", "import gradio as gr", "components/charts.py imports gradio"),
        ("components/views/save.py", "from gradio.events import x", "components/views/save.py imports gradio.events"),
    ],
)
def test_a_broken_import_rule_is_found(tmp_path: Path, path: str, line: str, sentence: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(line)
    assert any(found.endswith(sentence) for found in broken_rules(tmp_path))


def test_a_permitted_import_is_not(tmp_path: Path) -> None:
    (tmp_path / "llm_merge").mkdir()
    lines = "from llm_merge.errors import RecipeError\nfrom .recipe import Recipe\nimport math, pandas_like"
    (tmp_path / "llm_merge" / "weights.py").write_text(lines)
    assert broken_rules(tmp_path) == []


def test_an_import_cycle_is_found_and_one_for_types_is_not(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "a.py").write_text("def f():\n    from pkg.b import g\n")
    (tmp_path / "pkg" / "b.py").write_text("from .c import h\n")
    (tmp_path / "pkg" / "c.py").write_text("from pkg import a\n")
    assert import_cycle(tmp_path, "pkg") == ["pkg.a", "pkg.b", "pkg.c", "pkg.a"]
    (tmp_path / "pkg" / "c.py").write_text("if TYPE_CHECKING:\n    from pkg import a\n")
    assert import_cycle(tmp_path, "pkg") == []


def test_a_heavy_import_is_found() -> None:
    assert loaded_by("import plotly", {"plotly", "torch"}) == {"plotly"}


# ── the public face ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_public_names_are_listed_once_and_documented() -> None:
    import llm_merge

    names = llm_merge.__all__  # that they are sorted is ruff's business (RUF022)
    assert len(set(names)) == len(names)
    undocumented = [
        name for name in names if not name.startswith("__") and not inspect.getdoc(getattr(llm_merge, name))
    ]
    assert undocumented == []


def test_every_module_says_what_it_is_and_stays_readable() -> None:
    complaints = []
    for folder in ("llm_merge", "components"):
        for file in sorted((REPOSITORY / folder).glob("**/*.py")):
            text = file.read_text(encoding="utf-8")
            if not ast.get_docstring(ast.parse(text)):
                complaints.append(f"{file.relative_to(REPOSITORY)} does not say what it is")
            if (length := len(text.splitlines())) > 350:
                complaints.append(f"{file.relative_to(REPOSITORY)} has {length} lines: usually two ideas")
    assert complaints == []


# ── what the README promises ────────────────────────────────────────────────────────────────────────────────────────


def blocks(language: str) -> list[str]:
    """The README's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")


def test_the_two_commands_exist() -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("make ")]
    assert commands == ["make app", "make test"]
    for command in commands:
        assert re.search(rf"^{command.removeprefix('make ')}:", MAKEFILE, re.MULTILINE), command


def test_the_lines_without_make_install_what_make_does() -> None:
    by_hand = re.findall(r"pip install (.+)", "\n".join(blocks("bash")))
    by_make = re.findall(r"\$\(PIP\) (.+)", MAKEFILE)
    assert by_hand == by_make[: len(by_hand)]
    assert by_make[len(by_hand) :] == ["-c constraints.txt -r requirements-dev.txt"]


def test_ci_runs_the_same_command() -> None:
    lines = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").split("\n")
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test"]


def test_the_library_examples_fit_the_functions() -> None:
    import llm_merge

    calls = [node for block in blocks("python") for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    assert names == {
        "analyze_contributions", "hi_merge", "mix_models", "mix_models_with_data", "mix_models_by_layers",
    }  # fmt: skip
    for call in calls:
        if not isinstance(call.func, ast.Name):  # a method of what such a function returned
            continue
        arguments = {keyword.arg or "": None for keyword in call.keywords}
        inspect.signature(getattr(llm_merge, call.func.id)).bind(*call.args, **arguments)


def test_every_setting_in_the_readme_is_read_somewhere() -> None:
    table = re.findall(r"^\| (`[A-Z_`, ]+`) \|", README, re.MULTILINE)
    documented = {name for cell in table for name in re.findall(r"[A-Z_]+", cell)}
    code = "".join(file.read_text(encoding="utf-8") for file in [*source_files(), REPOSITORY / "app.py"])
    ours = set(re.findall(r"LLM_MERGE_[A-Z_]+", code)) | {"SPACE_ID"}
    assert ours <= documented
    assert {name for name in documented if name.startswith("LLM_MERGE_")} <= ours


def source_files() -> Iterator[Path]:
    for folder in ("llm_merge", "components"):
        yield from (REPOSITORY / folder).glob("**/*.py")


def test_a_space_can_read_the_front_matter() -> None:
    space = yaml.safe_load(README.split("---\n")[1])
    assert (space["sdk"], space["app_file"], space["python_version"]) == ("gradio", "app.py", "3.12")
    assert len(space["short_description"]) <= 60
    assert (REPOSITORY / space["app_file"]).is_file()
    assert f"gradio=={space['sdk_version']}" in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")


# ── what is installed ───────────────────────────────────────────────────────────────────────────────────────────────


def requirements(name: str) -> dict[str, Requirement]:
    """A requirement file as package → requirement, names spelled as package indexes do."""
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    return by_name(line for line in lines if line and not line.startswith("#"))


def by_name(lines: Iterator[str] | list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines]
    return {re.sub(r"[-_.]+", "-", requirement.name).lower(): requirement for requirement in found}


def test_the_library_asks_for_what_requirements_txt_asks_for() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    library = by_name(project["dependencies"])
    page = requirements("requirements.txt")
    assert library == {name: page.get(name) for name in library}
    assert set(page) - set(library) == {"gradio", "plotly", "pandas", "gguf"}


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned_inside_its_range(name: str) -> None:
    pins = requirements("constraints.txt")
    for package, requirement in requirements(name).items():
        assert package in pins, f"{package} of {name} is not in constraints.txt"
        (pin,) = pins[package].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{pins[package]} is not {requirement}"


def test_nothing_pins_pydantic_or_gradio_for_a_space() -> None:
    asked = requirements("requirements.txt")
    assert "pydantic" not in asked
    assert all(specifier.operator != "==" for requirement in asked.values() for specifier in requirement.specifier)
