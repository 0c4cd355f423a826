"""Profiles from YAML files: one file is one way to run the pipeline.

`NBG_PROFILE` chooses the profile, as a name in profiles/ or a path; the default is `embedded`. An unknown key is an
error that names the nearest known key. Relative paths in a profile start from its root: the key `root` of the file
(itself relative to the file's folder), else `NBG_ROOT`, else the folder that holds the file's `profiles/` folder, else
this project.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nbg_core.base.names import OneOf, file_name_problem, nearest
from nbg_core.config.profile import PROJECT_ROOT, Profile


class ProfileError(ValueError):
    """A profile that cannot be used: names the file, the key, the value and the remedy."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that refuses a mapping with the same key twice. Plain YAML would keep the second value and say
    nothing."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                problem = f"key {key.value!r} appears twice; keep one"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


def load_profile(which: str | Path | None = None) -> Profile:
    """The profile `which`, a name or a path; by default the one that `NBG_PROFILE` gives, else `embedded`.

    Raises ProfileError for a missing file, bad YAML, an unknown key or a bad value."""
    which = str(which or os.environ.get("NBG_PROFILE") or "embedded")
    folder = PROJECT_ROOT / "profiles"
    is_path = which.endswith((".yaml", ".yml"))
    path = Path(which) if is_path else folder / f"{which}.yaml"
    if not is_path and file_name_problem(which) or not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ProfileError(f"no profile {which!r} at {path}; known profiles: {', '.join(known)}, or give a .yaml path")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ProfileError(f"{path}: not valid YAML: {e}") from e
    if not isinstance(data, dict):
        raise ProfileError(
            f"{path}: a profile is a mapping of keys, got {type(data).__name__}; write `key: value` lines, like the "
            "profiles in profiles/"
        )
    data = {"name": path.stem, **data, "root": _root(path, data.get("root"))}
    try:
        return Profile.model_validate(data)
    except ValidationError as e:
        raise ProfileError(f"{path}: " + "; ".join(_explain(err, Profile) for err in e.errors())) from e


def _root(path: Path, root: object) -> object:
    """The folder that relative paths of the profile at `path` start from; `root` is the value of its key, if any."""
    folder = path.resolve().parent
    if root is not None:
        return (folder / root).resolve() if isinstance(root, str) else root  # Profile refuses a value that is no path
    if override := os.environ.get("NBG_ROOT"):
        return Path(override).resolve()
    return folder.parent if folder.name == "profiles" else PROJECT_ROOT


def _explain(error: ErrorDetails, model: type[BaseModel]) -> str:
    """One of pydantic's errors as a sentence: the key, its value and the remedy."""
    where = ".".join(str(p) for p in error["loc"] if p != "[key]")  # pydantic marks a mapping's key by "[key]"
    if error["type"] in ("extra_forbidden", "missing"):
        for part in error["loc"][:-1]:
            model = _section(model.model_fields[str(part)].annotation) or model
        key = str(error["loc"][-1])
        if error["type"] == "extra_forbidden":
            return f"unknown key {where!r}; {nearest(key, model.model_fields)}"
        return f"missing key {where!r}; add it: {' '.join((model.model_fields[key].description or '').split())}"
    message = error["msg"].removeprefix("Value error, ")  # pydantic's, before a validator's own sentence
    if not where or isinstance(error["input"], dict):  # a whole section: the sentence names the keys
        return f"{where}: {message}" if where else message
    return f"{where} = {error['input']!r}: {message}"


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, or may hold (`Section | None`); None for a plain value."""
    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def reference() -> str:
    """Every setting of a profile as a Markdown table: key, default, meaning."""

    def rows(model: type[BaseModel], prefix: str):
        for name, field in model.model_fields.items():
            section = _section(field.annotation)
            if (section is None or field.default is None) and prefix + name != "root":
                default = "required" if field.is_required() else f"`{_plain(field.default)}`"
                entries = [entry for m in field.metadata if isinstance(m, OneOf) for entry in m.table.items()]
                choices = "; ".join(f"`{name}`: {getattr(entry, 'meaning', '')}" for name, entry in entries)
                known = f" {choices}.".replace("|", "\\|") if choices else ""
                yield f"| `{prefix}{name}` | {default} | {' '.join((field.description or '').split())}{known} |"
            if section is not None:
                yield from rows(section, f"{prefix}{name}.")

    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows(Profile, "")]) + "\n"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
