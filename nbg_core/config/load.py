"""Profiles from YAML files: one file is one way to run the pipeline.

A profile is chosen by `NBG_PROFILE` (a name in profiles/ or a path), default `embedded`. An unknown key is refused with
the nearest known one. Relative paths in it start from its root: the key `root` of the file (itself relative to the
file), else `NBG_ROOT`, else the folder above the `profiles/` that the file lies in, else this project.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nbg_core.base.names import nearest
from nbg_core.config.profile import PROJECT_ROOT, Profile


class ProfileError(ValueError):
    """A profile that cannot be used: names the file, the key, the value and the remedy."""


class _EveryKeyOnce(yaml.SafeLoader):
    """YAML in which the second of two equal keys is an error; else it would silently replace the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"key {key.value!r} is there twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


def load_profile(which: str | Path | None = None) -> Profile:
    """The profile named or at the path `which`, else `NBG_PROFILE`, else `embedded`.

    Raises ProfileError for a missing file, bad YAML, an unknown key or a bad value."""
    which = str(which or os.environ.get("NBG_PROFILE") or "embedded")
    path = Path(which) if which.endswith((".yaml", ".yml")) else PROJECT_ROOT / "profiles" / f"{which}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in (PROJECT_ROOT / "profiles").glob("*.yaml"))
        raise ProfileError(f"no profile {which!r} at {path}; known profiles: {', '.join(known)}, or give a .yaml path")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _EveryKeyOnce) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ProfileError(f"{path}: not valid YAML: {e}") from e
    if not isinstance(data, dict):
        raise ProfileError(f"{path}: a profile is a mapping of keys, got {type(data).__name__}")
    data = {"name": path.stem, **data, "root": _root(path, data.get("root"))}
    try:
        return Profile.model_validate(data)
    except ValidationError as e:
        raise ProfileError(f"{path}: " + "; ".join(_explain(err, Profile) for err in e.errors())) from e


def _root(path: Path, root: object) -> object:
    """Where relative paths of the profile at `path`, whose key `root` is given, start from."""
    folder = path.resolve().parent
    if root is not None:
        return (folder / root).resolve() if isinstance(root, str) else root  # what is no text is refused as a value
    if override := os.environ.get("NBG_ROOT"):
        return Path(override).resolve()
    return folder.parent if folder.name == "profiles" else PROJECT_ROOT


def _explain(error: ErrorDetails, model: type[BaseModel]) -> str:
    where = ".".join(str(p) for p in error["loc"] if p != "[key]")  # pydantic's mark of a key of a mapping
    if error["type"] == "extra_forbidden":
        for part in error["loc"][:-1]:
            model = _section(model.model_fields[str(part)].annotation) or model
        return f"unknown key {where!r}; {nearest(str(error['loc'][-1]), model.model_fields)}"
    if error["type"] == "missing":
        return f"missing key {where!r}"
    return f"{where} = {error['input']!r}: {error['msg']}" if where else error["msg"]


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
                yield f"| `{prefix}{name}` | {default} | {' '.join((field.description or '').split())} |"
            if section is not None:
                yield from rows(section, f"{prefix}{name}.")

    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows(Profile, "")]) + "\n"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
