"""The rooms and the arrows between them, the registry, the size of files: what the code promises of its own shape."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from nbg_assets.plots import PLOTS
from nbg_core.assets import ASSETS, BY_NAME, settings_of
from nbg_core.checks.checks import CHECKS
from nbg_core.config import identity
from nbg_core.config.load import load_profile
from nbg_core.config.profile import PROJECT_ROOT
from nbg_core.lake.tables import TABLES
from nbg_core.lineage.run import Report
from nbg_core.losses.metrics import METRICS
from nbg_core.scorers.scorers import SCORERS

PACKAGES = (PROJECT_ROOT / "docs" / "architecture.md").read_text().partition("\n## Packages\n")[2].partition("\n#")[0]
ROOMS = re.findall(r"`(?:nbg_core/)?(\w+)(?:\.py|/)`", " ".join(re.findall(r"^\| (`.*?`) \|", PACKAGES, re.MULTILINE)))
"""The packages in the order of the table in docs/architecture.md: each imports those before it, and itself. `assets` is
nbg_core/assets.py."""

FOR_TYPES_ALONE = {
    ("nbg_assets.plots", "nbg_assets.metadata"),
    ("nbg_core.lake.catalog", "nbg_core.lake.lake"),
    ("nbg_core.losses.metrics", "nbg_core.losses.dpo"),
    ("nbg_core.scorers.scorers", "nbg_core.base.progress"),
}
"""Imports under `if TYPE_CHECKING`: no arrows, since nothing runs them."""

TABLES_OF_LINEAGE = {"lineage.materialisations"}
"""Tables that every commit writes."""

REASON = "Longer than 300 lines because"
"""What the docstring of a longer file says."""


def modules() -> dict[str, Path]:
    """Every module of the two packages by its dotted name; a package is its `__init__`."""
    found = {}
    for package in ("nbg_core", "nbg_assets"):
        for path in sorted((PROJECT_ROOT / package).rglob("*.py")):
            parts = path.relative_to(PROJECT_ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules that a file imports anywhere, lazily too, and whether that is for types alone."""

    def walk(node: ast.AST, typing: bool) -> Iterator[tuple[str, bool]]:
        match node:
            case ast.Import():
                yield from ((alias.name, typing) for alias in node.names)
            case ast.ImportFrom():
                assert node.level == 0, f"{path}: imports are absolute"
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    yield (name if name in MODULES else node.module), typing
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                yield from (found for child in node.body for found in walk(child, True))
                yield from (found for child in node.orelse for found in walk(child, typing))
            case _:
                for child in ast.iter_child_nodes(node):
                    yield from walk(child, typing)

    yield from walk(ast.parse(path.read_text()), False)


IMPORTS = {module: set(imports(path)) for module, path in MODULES.items()}


def arrows(*, typing: bool = False) -> set[tuple[str, str]]:
    """(importer, imported) of our own modules."""
    return {
        (module, name)
        for module, found in IMPORTS.items()
        for name, of_types in found
        if name in MODULES and name != module and of_types == typing
    }


def room(module: str) -> str:
    first, *rest = module.split(".")
    return first if first == "nbg_assets" or not rest else rest[0]


def test_every_module_is_in_a_package_of_the_table_in_the_documentation():
    assert {room(m) for m in MODULES} - {"nbg_core"} == set(ROOMS) and len(ROOMS) == len(set(ROOMS)) > 15


def test_no_arrow_points_upwards():
    order = {name: i for i, name in enumerate(ROOMS)}
    upwards = [(a, b) for a, b in arrows() if b != "nbg_core" and order[room(a)] < order[room(b)]]
    assert sorted(upwards) == []


def test_no_module_imports_itself_by_way_of_others():
    above: dict[str, set[str]] = {}
    for importer, imported in arrows():
        above.setdefault(importer, set()).add(imported)
    state: dict[str, str] = {}

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert state.get(module) != "open", f"import circle: {' -> '.join((*way[way.index(module) :], module))}"
        if module not in state:
            state[module] = "open"
            for name in sorted(above.get(module, ())):
                visit(name, (*way, module))
            state[module] = "done"

    for module in MODULES:
        visit(module, ())


def test_imports_for_types_alone_are_listed():
    assert arrows(typing=True) == FOR_TYPES_ALONE


def test_the_core_imports_nothing_of_dagster():
    wrong = {
        (module, name)
        for module, found in IMPORTS.items()
        for name, _ in found
        if module.startswith("nbg_core") and name.split(".")[0] in ("dagster", "nbg_assets")
    }
    assert wrong == set()


@pytest.mark.parametrize(
    "module", ["nbg_core.assets", "nbg_core.config.load", "nbg_core.checks.checks", "nbg_assets.definitions"]
)
def test_it_is_imported_without_heavy_libraries(module):
    heavy = "{'torch', 'transformers', 'deepspeed', 'vllm', 'matplotlib', 'reasoning_gym', 'math_verify'}"
    code = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT_ROOT, timeout=240)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr


def test_everything_is_imported_without_what_only_development_installs():
    with open(PROJECT_ROOT / "pyproject.toml", "rb") as file:
        wanted = tomllib.load(file)["project"]["optional-dependencies"]["dev"]
    dev = {Requirement(line).name.lower() for line in wanted}
    only_dev = [name for name, owners in packages_distributions().items() if {o.lower() for o in owners} <= dev]
    assert {"pytest", "triton"} <= set(only_dev)
    # Triton's own is imported where Triton is; a `__main__` runs a command.
    modules = [m for m in MODULES if m != "nbg_core.modeling.lm_head_kernels" and not m.endswith("__main__")]
    code = (
        f"import importlib, sys; sys.modules.update(dict.fromkeys({only_dev}))\n"  # None: an import raises ImportError
        f"for module in {modules}: importlib.import_module(module)\n"
        "import torch; from nbg_core.modeling.lm_head import lm_head_logps\n"
        "lm_head_logps(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.long), vocab=3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT_ROOT, timeout=240)
    assert done.returncode == 0, done.stderr


def test_assets_are_in_order_and_their_stages_are_there():
    assert len(BY_NAME) == len(ASSETS)
    for i, asset in enumerate(ASSETS):
        assert set(asset.upstream) <= {earlier.name for earlier in ASSETS[:i]}, asset.name
        tree = ast.parse(MODULES[asset.stage].read_text())
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert [a.arg for a in functions["materialise"].args.args] == ["run", "slice_name"], asset.stage
        module = importlib.import_module(asset.stage)
        assert getattr(module, "ASSET", asset.name) == asset.name, asset.stage
        report = inspect.signature(module.materialise, eval_str=True).return_annotation
        assert issubclass(report, Report), asset.stage


def test_every_table_has_a_writer():
    written = [table for asset in ASSETS for table in asset.tables]
    assert set(written) | TABLES_OF_LINEAGE == set(TABLES)
    shared = {table for table, n in Counter(written).items() if n > 1}
    assert shared == {"rejections"}, "its rows say of which stage they are"
    firsts = [asset.tables[0] for asset in ASSETS]
    assert len(set(firsts)) == len(firsts)
    for asset in ASSETS:
        if asset.partitioned:
            assert all("slice" in TABLES[table].column_names() for table in asset.tables), asset.name


def test_every_check_and_every_plot_is_there_and_used():
    for kind, known in (("checks", CHECKS), ("plots", PLOTS)):
        used = [name for asset in ASSETS for name in getattr(asset, kind)]
        assert set(used) == set(known), kind
        for asset in ASSETS:
            names = getattr(asset, kind)
            assert len(set(names)) == len(names), (asset.name, kind)


def test_metrics_have_names_of_their_own():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert not {"pairs", "chosen_tokens", "rejected_tokens"} & set(names), "those are the counts beside the sums"
    others = {plot for asset in ASSETS for plot in asset.plots if asset.name != "student_checkpoint"}
    assert not others & {metric.plot for metric in METRICS}


def test_scorers_have_names_that_no_column_beside_them_has():
    beside = {"query_id", "sample_id", "source", "finish_reason", "text", "score", "verdict"}
    assert not beside & set(SCORERS)


def test_no_setting_of_an_asset_hides_another_of_its_name(monkeypatch):
    profile = load_profile("embedded")
    for asset in ASSETS:
        assert isinstance(settings_of(asset.name, profile, "policy", "addition" if asset.partitioned else None), dict)
    monkeypatch.setitem(identity.IDENTITIES, "min_margin", lambda profile: "value")
    scorer = dataclasses.replace(SCORERS["teacher_loglik"], depends_on=("min_margin",))
    monkeypatch.setitem(SCORERS, "teacher_loglik", scorer)
    profile.preference.weights["teacher_loglik"] = 1.0
    with pytest.raises(ValueError, match="two settings of an asset have the name min_margin; give one another name"):
        settings_of("filtered_pairs", profile, "policy", "addition")


def test_a_file_of_more_than_300_lines_says_why():
    unexplained = {}
    for module, path in MODULES.items():
        text = path.read_text()
        if (n := len(text.splitlines())) > 300 and REASON not in (ast.get_docstring(ast.parse(text)) or ""):
            unexplained[module] = n
    assert unexplained == {}
