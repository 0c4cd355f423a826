"""The documentation: links and paths lead somewhere, commands exist, SQL runs, tables are those of the code (15 s)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from fake_worker import Fake, write_profile

from nbg_assets.cli.main import app
from nbg_core.assets import ASSETS
from nbg_core.config.load import _section, load_profile
from nbg_core.config.profile import PROJECT_ROOT, Profile
from nbg_core.lake.lake import Lake
from nbg_core.preference.pairs import REASONS
from nbg_core.queries.readers import KEYS
from nbg_core.queries.stage import REMEDY
from nbg_core.scorers.verifiers import VERIFIERS

PAGES = sorted([*PROJECT_ROOT.glob("*.md"), *PROJECT_ROOT.glob("docs/*.md"), *PROJECT_ROOT.glob("benchmarks/*.md")])
HISTORY = {"CHANGELOG.md"}
"""Pages that name what is no longer there."""
MADE = ("data/lake", "data/checkpoints", "data/work", "data/dagster_home")
"""Paths that a run makes."""
YOURS = {"profiles/mine.yaml"}
"""Paths that a reader is asked to make."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT_ROOT)))


def prose(text: str) -> str:
    """`text` without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The code blocks of a page in one of `languages`."""
    for language, body in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE):
        if language in languages:
            yield body


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every `nbg` command: in shell blocks, after a prompt, and in backticks that start with one."""
    shell = [line for body in blocks(page, "bash") for line in _joined(body)]
    shell += [line.removeprefix("$ ") for body in blocks(page, "console") for line in _joined(body) if line[:2] == "$ "]
    for line in [*shell, *re.findall(r"`([^`\n]+)`", prose(page.read_text()))]:
        for part in line.split(" && "):
            words = re.sub(r"^(\w+=\S+ )*(\.venv/bin/)?", "", part.strip())
            if words.startswith("nbg "):
                yield shlex.split(words, comments=True)[1:]


def _joined(body: str) -> list[str]:
    """The lines of a block, those within one pair of quotes as one."""
    lines, open_quote = [], False
    for line in body.splitlines():
        lines = [*lines[:-1], f"{lines[-1]}\n{line}"] if open_quote else [*lines, line]
        open_quote = lines[-1].count('"') % 2 == 1
    return lines


def statements() -> list[tuple[str, str]]:
    """(page, SQL) of every question in the documentation."""
    found = []
    for page in PAGES:
        found += [(page.name, body) for body in blocks(page, "sql")]
        found += [(page.name, args[1]) for args in commands(page) if args[0] == "sql" and args[1] != "..."]
    return found


@pages
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text()))
    broken = []
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or anchor and anchor not in anchors(target):
            broken.append(link)
    assert not broken


@pages
def test_every_path_is_there(page):
    if page.name in HISTORY:  # it names what has moved
        return
    paths = re.findall(
        r"`((?:nbg_core|nbg_assets|docs|tests|benchmarks|profiles|data)/[\w./-]*)`", prose(page.read_text())
    )
    kept = {path for path in paths if not path.startswith(MADE)} - YOURS
    assert not [path for path in kept if not (PROJECT_ROOT / path).exists()]


def test_moved_modules_are_where_the_changelog_says():
    text = (PROJECT_ROOT / "CHANGELOG.md").read_text()
    new = {
        name for row in re.findall(r"^\| `nbg_.*", text, re.MULTILINE) for name in row.split("|")[2].split("`")[1::2]
    }
    modules = [PROJECT_ROOT / name.replace(".", "/") for name in new]
    assert len(modules) > 40
    assert not [m for m in modules if not (m.with_suffix(".py").is_file() or (m / "__init__.py").is_file())]


@pages
def test_every_command_and_flag_exists(page):
    known = typer.main.get_command(app).commands
    wrong = []
    for name, *args in commands(page):
        if name not in known:
            wrong.append(name)
            continue
        options = {flag for p in known[name].params for flag in p.opts if flag.startswith("-")}
        wrong += [(name, arg) for arg in args if arg.startswith("-") and arg.partition("=")[0] not in options]
    assert not wrong


def test_every_command_is_documented():
    text = (PROJECT_ROOT / "README.md").read_text()
    assert not [name for name in typer.main.get_command(app).commands if f"| `nbg {name}" not in text]


@pages
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT_ROOT / "Makefile").read_text(), re.MULTILINE))
    assert not set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)) - targets


@pages
def test_every_setting_exists(page):
    if page.name == "profile.md":  # made from the code, and tested as such in test_config.py
        return
    wrong = []
    for path in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?::[^`]*)?`", prose(page.read_text())):
        first, *rest = path.split(".")
        if first in Profile.model_fields and not _has(Profile, [first, *rest]):
            wrong.append(path)
    assert not wrong


def _has(model: type, path: list[str]) -> bool:
    """Whether a profile has a setting of this path."""
    first, *rest = path
    fields = getattr(model, "model_fields", {})
    return first in fields and (not rest or _has(_section(fields[first].annotation), rest))


@pytest.fixture(scope="module")
def lake(tmp_path_factory) -> Lake:
    """A lake in which every asset has rows."""
    path = str(write_profile(tmp_path_factory.mktemp("docs"), ("sorting",)))
    fake = Fake()
    for asset in ASSETS:
        fake(asset.name, "sorting" if asset.partitioned else None, "run", profile=path, on_line=lambda _: None)
    return Lake.of(load_profile(path))


@pytest.mark.parametrize(("page", "statement"), statements())
def test_every_question_runs(lake, page, statement):
    lake.sql(re.sub(r"VERSION => \d+", f"VERSION => {lake.snapshot()}", statement))


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md", "docs/sql.md"])
def test_every_python_block_runs(lake, page, monkeypatch, capsys):
    folder = Path(lake.data_path).parents[1]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NBG_PROFILE", str(folder / "test.yaml"))
    for block in blocks(PROJECT_ROOT / page, "python"):
        names: dict = {}
        exec(block.replace("sqlite:data/lake", "sqlite:lake"), names)
        assert "pairs" not in names or names["pairs"].height
    assert ("sorting" in capsys.readouterr().out) == (page == "docs/sql.md")


def test_there_are_questions():
    assert {"README.md", "guide.md", "sql.md"} <= {page for page, _ in statements()} and len(statements()) > 12


def test_the_readme_is_short():
    assert len((PROJECT_ROOT / "README.md").read_text().splitlines()) < 200


def test_the_page_on_data_says_of_verifiers_and_reasons_what_the_code_says():
    text = (PROJECT_ROOT / "docs" / "data.md").read_text()
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)  # of a link, its text

    def rows(heading: str) -> dict[str, list[str]]:
        section = re.sub(r"[`*]", "", text.partition(f"## {heading}\n")[2].partition("\n## ")[0])
        cells = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", section, re.MULTILINE)]
        return {first: rest for first, *rest in cells}

    verifiers, reasons, dropped = map(rows, ("Verifiers", "Why a query has no pair", "What is dropped"))
    assert {name: verifiers[name][0] for name in VERIFIERS} == {v.name: v.meaning for v in VERIFIERS.values()}
    assert {name: reasons[name] for name in REASONS} == {name: [r.meaning, r.remedy] for name, r in REASONS.items()}
    assert {name: dropped[name][-1] for name in REMEDY} == {
        name: remedy.replace("`", "") for name, remedy in REMEDY.items()
    }


def test_the_page_on_data_names_every_key_verifier_and_reason():
    text = (PROJECT_ROOT / "docs" / "data.md").read_text()

    def first_cells(start: str) -> set[str]:
        """Of the tables between `start` and the next section."""
        section = text.partition(start)[2].partition("\n## ")[0]
        return set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))

    assert first_cells("# Query files") == set(KEYS)
    assert first_cells("## Verifiers") == set(VERIFIERS)
    assert first_cells("## What is dropped") == set(REMEDY)
    assert first_cells("## Why a query has no pair") == set(REASONS)


def test_the_readme_names_every_asset_and_profile():
    text = (PROJECT_ROOT / "README.md").read_text()
    assert not [asset.name for asset in ASSETS if f"`{asset.name}`" not in text]
    profiles = [path.stem for path in (PROJECT_ROOT / "profiles").glob("*.yaml")]
    assert profiles and not [name for name in profiles if f"| `{name}` |" not in text]
