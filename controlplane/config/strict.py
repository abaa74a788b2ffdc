"""The base of all configuration models: strict, frozen, and able to report several problems at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

PathPart = str | int


@dataclass(frozen=True, slots=True)
class ConfigFinding:
    """A problem that the types of fields don't express, such as a contradiction between two fields."""

    path: tuple[PathPart, ...]
    """Relative to the model that reports the finding."""
    message: str
    remedy: str = ""
    uses: tuple[str, ...] = ()
    """Other fields that the finding depends on: it is not reported if one of them is invalid."""


class FindingsError(ValueError):
    """Carries findings through pydantic's validation."""

    def __init__(self, findings: Sequence[ConfigFinding]) -> None:
        self.findings = tuple(findings)
        super().__init__("; ".join(finding.message for finding in findings))


class Strict(BaseModel):
    """Unknown keys are errors, values are not coerced to other types, instances are frozen.

    A subclass overrides :meth:`findings` to check its fields against each other.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    def findings(self) -> list[ConfigFinding]:
        """Problems between fields that are each valid."""
        return []

    @model_validator(mode="after")
    def _no_findings(self) -> Self:
        found = self.findings()
        if found:
            raise FindingsError(found)
        return self
