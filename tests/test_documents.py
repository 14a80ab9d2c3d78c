"""README, CHANGELOG and guide: their links lead somewhere, and what they say of the families is what the records say."""

from __future__ import annotations

import re

import pytest
from host.server import REPO

from blockdance_core.config import Config
from blockdance_core.families import Family, declared

DOCUMENTS = [REPO / "README.md", REPO / "CHANGELOG.md", *sorted((REPO / "docs").glob("*.md"))]
README = (REPO / "README.md").read_text(encoding="utf-8")
ROWS = {cells[0]: cells for line in README.splitlines() if len(cells := line.strip("| ").split(" | ")) == 5}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_to_files_and_headings(document) -> None:
    text = document.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("family", declared(), ids=lambda family: family.name)
def test_readme_row_of_family_says_what_its_record_says(family: Family) -> None:
    _, _, skips, window, source = ROWS[family.name]

    assert window == "{:.2f} to {:.2f}".format(*family.defaults.paper_window)
    assert source == family.defaults.source
    for skipped, depth in re.findall(r"(\d+) of (\d+)", skips):
        assert int(skipped) == family.defaults.boundary(int(depth)) + 1


def test_readme_values_of_auto_hold_for_every_family() -> None:
    assert "`auto` uses the noise-level window 0.40 to 0.95 and the forecast `taylor` for all families" in README
    assert {(*family.defaults.window, family.defaults.forecast) for family in declared()} == {(0.40, 0.95, "taylor")}


def test_changelog_names_every_input() -> None:
    changelog = (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
    for name in ("BlockDanceAccelerate", "BlockDanceReport", "model", "policy", *Config.__dataclass_fields__):
        assert f"`{name}`" in changelog
