"""docs/models.md, made from the family records and from what the suite runs: it cannot say more than is tested."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from host.server import REPO
from tiny import DECLARED, Case

from blockdance_core.config import Defaults
from blockdance_core.families import Family, declared, find

PATH = REPO / "docs" / "models.md"
UPDATE = "python dev.py test tests/test_documents.py --update-docs"


def page() -> str:
    """The whole document."""
    cases: dict[str, list[Case]] = {}
    for case in DECLARED:
        name = find(case.build().model.diffusion_model).family.name
        cases.setdefault("" if name.startswith("undeclared") else name, []).append(case)
    rows = [_row(family, cases[family.name]) for family in sorted(declared(), key=lambda family: family.name.lower())]
    checks = sorted(f"- {_first_line(path)}" for path in (REPO / "tests" / "contract").glob("test_*.py"))
    refused = [f"- `{name}` ({family.name}): {reason}." for family in declared() for name, reason in family.refused]
    auto = Defaults()
    return "\n".join([
        "# Models",
        "",
        f"Made by `{UPDATE}` from the family records and the suite's list of tiny models; the suite fails where they differ.",
        "",
        f"`auto` takes the noise-level window {_window(auto.window)} and the forecast `{auto.forecast}` for every family. The "
        "recommended boundary is `round(0.75 * L) - 1` for L blocks; the third column says what that skips. *By analogy* means "
        "that nobody has measured the values on that family yet; *published* means taken from the paper.",
        "",
        "| Family | Checked on | A reuse step skips | `paper` window | Values | Notes |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "## What is checked on these tiny models",
        "",
        "Each is built through ComfyUI's own class and configuration, with random weights, at a depth of 6 to 10 blocks. They "
        "show that the code is right; they do not show how good the pictures of a full-size model are.",
        "",
        *checks,
        "",
        "On every case it is checked that blocks are skipped and outputs injected exactly; what depends on the engine and on "
        "the kind of model alone, on one case of each family.",
        "",
        "Cases with *control* also run these with control residuals between the blocks.",
        "",
        "## Other models",
        "",
        "Accelerated by structure, if exactly one list of like blocks holds most of the model, and if the flow between them is "
        f"plain on the first evaluation of every run. Proved on {', '.join(f'`{case.name}`' for case in cases[''])}, and by "
        "running every tiny model above as if it were not declared: each is then accelerated with the very same result, or "
        "computed in full.",
        "",
        "Refused by name:",
        "",
        *refused,
        "",
        "U-Nets (SD 1.5, SDXL, Stable Cascade, SVD) pass through, and the node says so.",
        "",
    ])


def _row(family: Family, cases: list[Case]) -> str:
    defaults = family.defaults
    skips = [f"{defaults.boundary(depth) + 1} of {depth} ({name})" for name, depth in family.depths]
    cells = [
        family.name,
        ", ".join(f"{case.name} (control)" if case.control else case.name for case in cases),
        "; ".join(skips) or "three quarters of as many as the checkpoint has",
        _window(defaults.paper_window),
        defaults.source,
        "; ".join(_notes(family)),
    ]
    return f"| {' | '.join(cells)} |"


def _notes(family: Family) -> Iterator[str]:
    for position, section in enumerate(family.sections):
        if section.long_skips:
            yield "what skipped blocks hand to live ones over long skips is stored, too"
        if section.batch_dim is None:
            yield "the conditionings of one call are one stream"
        if section.obstacle:
            yield "calls in which the model fills a cache of its own compute"
        if section.live:
            yield "the last block always runs"
        if position and section.join is None:
            yield f"forecast `hold` in {section.path}"


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring is not None
    return docstring.split("\n\n")[0].replace("\n", " ")


def _window(shares: tuple[float, float]) -> str:
    return "{:.2f} to {:.2f}".format(*shares)
