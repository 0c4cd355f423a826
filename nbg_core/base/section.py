"""The base of every settings class: fields are fixed, typed and documented; unknown keys are refused."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from nbg_core.base.ids import digest


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(),
                              allow_inf_nan=False)  # fmt: skip

    def settings_id(self, *more: Any) -> str:
        """Hash of this section (and `more`), the part of lineage that says 'made with other settings'."""
        return digest(self.model_dump(mode="json"), *more)
