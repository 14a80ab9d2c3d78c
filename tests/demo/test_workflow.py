"""The two forms of the demo workflow say the same and use nodes and inputs that exist."""

import json
from pathlib import Path

import pytest

import demo
from demo import run, scenes
from demo.architectures import ARCHITECTURES

FOLDER = Path(demo.__file__).parent
API = json.loads((FOLDER / "workflow_api.json").read_text(encoding="utf-8"))
PAGE = json.loads((FOLDER / "workflow.json").read_text(encoding="utf-8"))


def test_workflow_both_forms_have_the_same_nodes_and_links():
    nodes = {str(n["id"]): n for n in PAGE["nodes"] if n["type"] != "MarkdownNote"}
    assert {k: n["class_type"] for k, n in API.items()} == {k: n["type"] for k, n in nodes.items()}
    linked = {
        (key, name): (value[0], value[1])
        for key, node in API.items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }
    drawn = {
        (str(to), nodes[str(to)]["inputs"][place]["name"]): (str(origin), slot)
        for _, origin, slot, to, place, _ in PAGE["links"]
    }
    assert linked == drawn


def test_workflow_both_forms_have_the_same_values():
    for node in PAGE["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        named = [i["name"] for i in node["inputs"] if "widget" in i]
        values = [v for v in node["widgets_values"] if v != "fixed"]
        assert dict(zip(named, values, strict=True)) == {
            k: v for k, v in API[str(node["id"])]["inputs"].items() if not isinstance(v, list)
        }


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_with_model_samples_as_the_card_of_the_model_says(model):
    prompt = run.with_model(API, model)
    how = ARCHITECTURES[model].sampling
    inputs = run.only(prompt, "KSampler")[1]["inputs"]
    assert run.only(prompt, "BlockDanceDemoLoader")[1]["inputs"]["name"] == model
    assert (inputs["sampler_name"], inputs["scheduler"]) == (how["sampler"], how["scheduler"])
    assert (inputs["cfg"], inputs["steps"]) == (how["cfg"], how["steps"])
    assert run.only(API, "BlockDanceDemoLoader")[1]["inputs"]["name"] == "sd3-mini"


@pytest.mark.parametrize("moving", [False, True], ids=["picture", "clip"])
def test_caption_is_one_for_every_model(moving):
    texts = [node["inputs"]["text"] for node in API.values() if node["class_type"] == "BlockDanceDemoCaption"]
    (text,) = filter(None, texts)
    scenes.parse(text, moving)
