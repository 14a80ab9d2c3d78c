"""README, CHANGELOG and guide: their links lead somewhere, and what they say of the families is what the records say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import models_page
import pytest
from host.server import REPO

from blockdance_core import policy
from blockdance_core.config import Config
from blockdance_core.families import Family, declared
from demo.architectures import ARCHITECTURES
from demo.bench import page as bench_page
from demo.loader import POLICIES

DOCUMENTS = [REPO / "README.md", REPO / "CHANGELOG.md", *sorted(REPO.glob("docs/*.md")), *sorted(REPO.glob("demo/**/*.md"))]
README = (REPO / "README.md").read_text(encoding="utf-8")


def headings(document: Path) -> set[str]:
    """What links to a document may name behind #."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_relative_links_lead_to_files_and_headings(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            name, _, heading = target.partition("#")
            path = document.parent / name if name else document
            assert path.exists(), target
            assert not heading or heading in headings(path), target


def test_table_of_models_is_the_one_that_records_and_suite_make(request: pytest.FixtureRequest) -> None:
    page = models_page.page()
    if request.config.getoption("--update-docs"):
        models_page.PATH.write_text(page, encoding="utf-8")
    assert models_page.PATH.read_text(encoding="utf-8") == page, f"run {models_page.UPDATE}"


@pytest.mark.skipif(not bench_page.JSON.is_file(), reason="nothing has been measured yet")
def test_page_of_benchmarks_is_the_one_that_the_figures_make(request: pytest.FixtureRequest) -> None:
    data = json.loads(bench_page.JSON.read_text(encoding="utf-8"))
    text = bench_page.render(data)
    if request.config.getoption("--update-docs"):
        bench_page.PAGE.write_text(text, encoding="utf-8")
    assert bench_page.PAGE.read_text(encoding="utf-8") == text, f"run {bench_page.UPDATE}"
    assert all((bench_page.DOCS / group.picture).is_file() for group in bench_page.groups(data))


def test_readme_has_the_tables_of_the_benchmarks() -> None:
    data = json.loads(bench_page.JSON.read_text(encoding="utf-8"))
    for table in (bench_page.largest_cuts(data), bench_page.qualities(data)):
        assert "\n".join(table) in README, "copy both tables of 'At a glance' from docs/benchmarks.md"


def test_figures_of_calibrated_policies_are_of_the_policies_that_are_shipped() -> None:
    levels = {
        (name, entry.steps, f"cut={cut:.3f}")
        for name in ARCHITECTURES for entry in policy.load(POLICIES / f"{name}.safetensors").entries for cut in entry.cuts
    }
    points = json.loads(bench_page.JSON.read_text(encoding="utf-8"))["points"]
    measured = {(one["model"], one["steps"], one["setting"]) for one in points if one["method"] == "ours-calibrated"}
    assert measured
    assert measured <= levels


@pytest.mark.parametrize("family", declared(), ids=lambda family: family.name)
def test_readme_names_every_family(family: Family) -> None:
    assert any(f"**{family.name}**" in line for line in README.splitlines())
    assert (*family.defaults.window, family.defaults.forecast) == (0.40, 0.95, "taylor")


def test_changelog_names_every_input() -> None:
    changelog = (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
    nodes = (
        "BlockDanceAccelerate", "BlockDanceReport", "BlockDanceLoadPolicy", "BlockDanceProfile", "BlockDanceCalibrate",
        "BlockDanceTrainPolicy",
    )
    inputs = (
        "model", "policy_name", "profile", "boundaries", "cut", "fidelity", "effort", "choices", "start", "tradeoffs", "reward",
        "epochs", "seed", "prompts", "clip", "vae", "clip_vision",
    )
    for name in (*nodes, *inputs, *(name for name in Config.__dataclass_fields__ if name != "tolerance")):
        assert f"`{name}`" in changelog
