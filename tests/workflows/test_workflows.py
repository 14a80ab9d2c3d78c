"""The example workflows: accepted by the host, listed as templates, tidy, and with our two nodes in the right place."""

from __future__ import annotations

import io
from itertools import combinations
from typing import TYPE_CHECKING

from host.server import REPO
from PIL import Image
from saved import NOTES, SavedWorkflow, box, group_box, widgets

if TYPE_CHECKING:
    from conftest import Host

LOADERS = ("CheckpointLoaderSimple", "UNETLoader")
SAMPLER = "KSampler"


def test_workflow_on_the_real_host_is_accepted(host: Host, workflow: SavedWorkflow) -> None:
    status, answer = host.validate(workflow.prompt(host.definitions))

    assert (status, answer.get("node_errors")) == (200, {}), answer


def test_workflow_with_unknown_preset_is_refused(host: Host, workflow: SavedWorkflow) -> None:
    prompt = workflow.prompt(host.definitions)
    number = str(workflow.one("BlockDanceAccelerate")["id"])
    prompt[number]["inputs"]["preset"] = "no such preset"

    status, answer = host.validate(prompt)

    assert status == 400
    assert number in answer["node_errors"]


def test_template_list_names_workflow(host: Host, workflow: SavedWorkflow) -> None:
    assert workflow.name in host.get("/api/workflow_templates")[REPO.name]


def test_template_thumbnail_is_served_as_a_small_jpeg(host: Host, workflow: SavedWorkflow) -> None:
    content, kind = host.read(f"/api/workflow_templates/{REPO.name}/{workflow.name}.jpg")

    assert kind == "image/jpeg"
    assert len(content) < 200_000
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "JPEG"
        assert picture.width >= 640


def test_saved_accelerate_values_are_the_defaults(host: Host, workflow: SavedWorkflow) -> None:
    declared = host.definitions["BlockDanceAccelerate"]["input"]
    saved = widgets(workflow.one("BlockDanceAccelerate"), declared)

    specs = {**declared["required"], **declared["optional"]}
    defaults = {name: spec[1]["default"] for name, spec in specs.items() if "default" in spec[1]}
    assert saved == defaults


def test_files_named_for_download_are_the_files_loaded(workflow: SavedWorkflow) -> None:
    for node in workflow.nodes.values():
        for model in node["properties"].get("models", ()):
            assert model["name"] in node["widgets_values"]
            assert model["url"].startswith("https://huggingface.co/")
    loaders = workflow.all(*LOADERS, "CLIPLoader", "VAELoader")
    assert loaders
    assert all(node["properties"]["models"] for node in loaders)


def test_accelerate_directly_follows_the_model_loader(workflow: SavedWorkflow) -> None:
    loader, output = workflow.source(workflow.one("BlockDanceAccelerate"), "model")

    assert loader["type"] in LOADERS
    assert loader["outputs"][output]["type"] == "MODEL"


def test_report_stands_between_sampler_and_decoder(workflow: SavedWorkflow) -> None:
    report = workflow.one("BlockDanceReport")

    assert workflow.source(report, "latent") == (workflow.one(SAMPLER), 0)
    assert workflow.source(report, "model") == (workflow.one("BlockDanceAccelerate"), 0)
    assert workflow.source(workflow.one("VAEDecode"), "samples") == (report, 0)
    assert workflow.source(workflow.one("PreviewImage"), "images") == (report, 1)
    assert workflow.source(workflow.one("PreviewAny"), "source") == (report, 2)


def test_notes_say_where_files_are_what_to_tweak_and_what_to_expect(workflow: SavedWorkflow) -> None:
    assert {note["title"] for note in workflow.all(*NOTES)} == {"Files", "What to tweak", "What to expect"}


def test_links_are_recorded_alike_on_both_ends(workflow: SavedWorkflow) -> None:
    for link in workflow.links.values():
        source, target = workflow.nodes[link.source], workflow.nodes[link.target]
        assert link.number in source["outputs"][link.output]["links"]
        assert target["inputs"][link.input]["link"] == link.number
        assert source["outputs"][link.output]["type"] == link.type


def test_nodes_do_not_overlap_and_lie_in_one_group(workflow: SavedWorkflow) -> None:
    for one, other in combinations(workflow.nodes.values(), 2):
        assert not box(one).overlaps(box(other)), (one["type"], other["type"])
    for node in workflow.nodes.values():
        assert sum(group_box(group).holds(box(node)) for group in workflow.groups) == 1, node["type"]
