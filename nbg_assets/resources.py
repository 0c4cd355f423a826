"""The Dagster resource that gives steps, schedules and sensors the profile and its lake."""

from __future__ import annotations

import dagster as dg
from pydantic import Field, PrivateAttr

from nbg_core.config.load import load_profile
from nbg_core.config.profile import Profile
from nbg_core.lake.lake import Lake


class NbgResource(dg.ConfigurableResource):
    """The profile and its lake, opened when first used."""

    profile: str = Field(description="Profile to run with: a name in profiles/ or a path (NBG_PROFILE sets it).")
    _lake: Lake | None = PrivateAttr(default=None)

    def load(self) -> Profile:
        """The profile, read from its file. Raises ProfileError naming the file, the key and the remedy."""
        return load_profile(self.profile)

    def lake(self) -> Lake:
        """The profile's lake, created if it does not exist; opened once per run or tick."""
        if self._lake is None:
            self._lake = Lake.of(self.load())
        return self._lake
