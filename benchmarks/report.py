"""Where benchmarks put what they find: `results/NAME.json` and a section of README.md between two markers."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

HERE = Path(__file__).parent


def machine(*packages: str) -> dict:
    """Processor, cores used and versions, as every row has them."""
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
    """Write `rows`, each with what `machine` gave (rows of an earlier run keep theirs), and put `section` (Markdown)
    between the markers of `name`."""
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / f"{name}.json").write_text(json.dumps([about | r for r in rows], indent=1) + "\n")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    readme = folder / "README.md"
    before, rest = readme.read_text().split(begin)
    versions = ", ".join(f"{p} {v}" for p, v in about["versions"].items())
    said = f"{about['machine']}, {about['cores']} cores, {about['threads']} threads; {versions}."
    readme.write_text("\n\n".join([before + begin, said, section.strip(), end]) + rest.split(end)[1])


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)
