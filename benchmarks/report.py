"""How benchmarks store their results: in `results/NAME.json`, and in README.md between the two markers of NAME."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

HERE = Path(__file__).parent


def machine(*packages: str) -> dict:
    """What every row of results records of where it was measured: processor or GPU, cores, threads, versions."""
    model = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else model or platform.processor()
    return {
        "machine": where, "cores": psutil.cpu_count(logical=False), "threads": torch.get_num_threads(),
        "versions": {p: v for p in ("torch", "transformers", *packages) if (v := _version(p))},
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(name: str, rows: list[dict], section: str, about: dict, *, folder: Path = HERE) -> None:
    """Write `rows` to results/NAME.json, and `section` (Markdown) between the markers of `name` in README.md.

    `about` is what `machine` returned. It is added to every row that has no such fields yet: rows that are kept from an
    earlier run keep theirs."""
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / f"{name}.json").write_text(json.dumps([about | r for r in rows], indent=1) + "\n")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    readme = folder / "README.md"
    before, rest = readme.read_text().split(begin)
    versions = ", ".join(f"{p} {v}" for p, v in about["versions"].items())
    line = f"{about['machine']}, {about['cores']} cores, {about['threads']} threads; {versions}."
    readme.write_text("\n\n".join([before + begin, line, section.strip(), end]) + rest.split(end)[1])


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)
