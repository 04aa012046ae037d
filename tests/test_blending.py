"""Blending adapters: equal to PEFT's add_weighted_adapter, and what cannot be blended."""

import dataclasses
import json
import warnings

import pytest
import torch
from adapters import adapter_folder
from checkpoints import hugging_face
from peft import LoraConfig, PeftModel, get_peft_model

from lora_engine import __main__ as verbs
from lora_engine import cli
from lora_engine.captioning.adapted_captioner import with_adapter
from lora_engine.commands.blend import _names_and_weights
from lora_engine.lora.adapter import AdapterError, load_adapter, read_adapter
from lora_engine.lora.blending import blend
from lora_engine.lora.injection import lora_layers
from lora_engine.models.pretrained import load_captioner

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

# Different ranks, alphas, scalings and targets; "c" and "c_attn" are in some adapters only.
SETTINGS = [
    {"r": 3, "lora_alpha": 5, "target_modules": ["query", "key", "c_attn"],
     "rank_pattern": {"key|0.attn.c_attn": 2}, "alpha_pattern": {"query|c_attn": 7}},
    {"r": 4, "lora_alpha": 6, "target_modules": ["query", "c_attn", "c_proj"], "use_rslora": True},
]
WEIGHTS = [0.7, -0.4]


@pytest.fixture(scope="module")
def made(captioner_folder, tmp_path_factory):
    """Two adapters that PEFT has written, and a model of PEFT's that has both."""
    folder = tmp_path_factory.mktemp("adapters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(hugging_face(captioner_folder), LoraConfig(**SETTINGS[0]), "a")
        model.add_adapter("b", LoraConfig(**SETTINGS[1]))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.normal_(std=0.1)
        model.save_pretrained(str(folder))
    return captioner_folder, model, [read_adapter(folder / name) for name in "ab"]


def updates(model, name: str) -> dict[str, torch.Tensor]:
    """The update of each layer by an adapter of PEFT's."""
    return {
        path.removeprefix("base_model.model."): layer.get_delta_weight(name).detach()
        for path, layer in model.named_modules()
        if name in getattr(layer, "lora_A", {})
    }


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for path, update in expected.items():
        torch.testing.assert_close(found[path], update, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 2])
def test_blends_equal_pefts(made, tmp_path, rank):
    base, model, adapters = made
    result = blend(adapters, WEIGHTS, rank=rank)
    result.save(tmp_path / "c")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = {"combination_type": "cat"} if rank is None else {
            "combination_type": "svd", "svd_rank": rank}
        name = f"of_peft_{rank}"
        model.add_weighted_adapter(["a", "b"], WEIGHTS, name, **kind)
        loaded = PeftModel.from_pretrained(hugging_face(base), str(tmp_path / "c"))
    found = updates(loaded, "default")
    assert_near(found, updates(model, name))
    whole = {
        path: sum(w * updates(model, n)[path] for w, n in zip(WEIGHTS, "ab")
                  if path in updates(model, n))
        for path in found
    }
    if rank is None:
        assert_near(found, whole)
        return
    cut = {path: (whole[path] - found[path]).norm() / whole[path].norm() for path in found}
    assert result.worst[1] == pytest.approx(float(max(cut.values())), rel=1e-3)
    total = [torch.cat([m.flatten() for m in ms.values()]) for ms in (whole, found)]
    expected = float((total[0] - total[1]).norm() / total[0].norm())
    assert result.error == pytest.approx(expected, rel=1e-3) and 0 < expected < 1


def test_a_blend_loads_here_and_can_be_trained_on(made, tmp_path):
    base, _, adapters = made
    blend(adapters, WEIGHTS).save(tmp_path)
    captioner = load_captioner(base)
    before = {name: tensor.clone() for name, tensor in captioner.model.state_dict().items()}
    merged = with_adapter(captioner, read_adapter(tmp_path)).model.state_dict()
    expected = dict(before)
    for adapter, weight in zip(adapters, WEIGHTS):
        alone = with_adapter(captioner, adapter).model.state_dict()
        for name, tensor in before.items():
            expected[name] = expected[name] + weight * (alone[name] - tensor)
    for name, tensor in before.items():
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-5, atol=1e-5)
    load_adapter(captioner.model, tmp_path)
    assert {layer.scaling for _, layer in lora_layers(captioner.model)} == {1.0}


def test_equal_matrices_are_stored_once_and_one_adapter_is_scaled(made):
    _, _, (adapter, _) = made
    twice = blend([adapter, adapter], [0.5, 0.25])
    once = blend([adapter, adapter], [0.75, 0.0])
    for path, (A, B) in twice.matrices.items():
        assert torch.equal(A, adapter.matrices[f"{path}.lora_A"])
        torch.testing.assert_close(B, once.matrices[path][1])
    exact = blend([adapter], [1.0], rank=50)  # more than there is
    assert exact.error == 0 and exact.worst[1] == 0


def _changed(adapter, provenance=None, **config):
    return dataclasses.replace(
        adapter, config=adapter.config | config,
        provenance=adapter.provenance if provenance is None else provenance,
    )


@pytest.mark.parametrize("change, words", [
    ({"use_dora": True}, r"is a DoRA adapter, and only .* merge it instead \(python -m"),
    ({"lora_bias": True}, "has LoRA layers with a bias"),
    ({"bias": "all"}, "replaces tensors of the base"),
    ({"modules_to_save": ["cls"]}, "replaces tensors of the base"),
    ({"base_model_name_or_path": "owner/other"}, "was trained on owner/other, and"),
    ({"provenance": {"base_fingerprint": "1"}}, r"differs from that of .* in its weights \("),
    ({"provenance": {"base_fingerprint": "0", "prompt": "a dog"}}, "different prompts: '' .*'a do"),
    ({"fan_in_fan_out": "yes"}, "fan_in_fan_out differs"),
    ({"target_modules": ["value"]}, "target_modules does not cover it"),
])
def test_adapters_that_cannot_be_blended(blip_adapter, change, words):
    first = _changed(blip_adapter, provenance={"base_fingerprint": "0", "prompt": ""})
    if "base_model_name_or_path" in change:
        first = blip_adapter = _changed(blip_adapter, provenance={})
    change = {"provenance": first.provenance} | change
    with pytest.raises(AdapterError, match=words):
        blend([first, _changed(blip_adapter, **change)], [0.5, 0.5])


@pytest.mark.parametrize("weights", [[0, 0], [1, float("nan")], [float("inf"), 1]])
def test_weights_are_finite_and_not_all_0(blip_adapter, weights):
    with pytest.raises(AdapterError, match="expected finite numbers, not all 0"):
        blend([blip_adapter, blip_adapter], weights)


@pytest.fixture(scope="module")
def blip_adapter(blip_folder, tmp_path_factory):
    return read_adapter(adapter_folder(blip_folder, tmp_path_factory.mktemp("a"), prompt="a dog"))


def test_adapters_of_other_shapes_are_refused(blip_adapter):
    wide = {name: torch.cat([m, m], 1) if name.endswith("A") else m
            for name, m in blip_adapter.matrices.items()}
    with pytest.raises(AdapterError, match=r"for different bases: .* has \(in, out\) of"):
        blend([blip_adapter, dataclasses.replace(blip_adapter, matrices=wide)], [1, 1])


def test_the_command(command, blip_adapter):
    names = [f"{blip_adapter.folder}:0.5", f"{blip_adapter.folder}:0.25"]
    status, out, err = command(verbs.run_verb, "blend", *names, "--out", "c", "--rank", 1)
    assert (status, err) == (0, "") and "LoRA of rank 1 on" in out and "cut by rank 1: " in out
    assert "caption --adapter c photo.jpg" in out and "evaluate --adapter c --data" in out
    written = read_adapter(command.work / "c")
    assert written.prompt == "a dog" and written.base_model == blip_adapter.base_model
    assert written.provenance["base_fingerprint"] == blip_adapter.provenance["base_fingerprint"]
    assert written.provenance["blended_from"].startswith(f"0.5 {blip_adapter.folder} + 0.25 ")
    assert json.loads((command.work / "c/adapter_config.json").read_text())["lora_alpha"] == 1
    status, _, err = command(verbs.run_verb, "blend", *names, "--out", "c")
    assert status == cli.USAGE_ERROR and "--out c already holds files" in err
    status, _, err = command(verbs.run_verb, "blend", *names, "--out", "d", "--rank", 0)
    assert status == cli.USAGE_ERROR and "the rank is 0; it must be 1 or more" in err
    status, out, _ = command(verbs.run_verb, "blend", *names, "--out", "a/b/c", "--rank", 500)
    assert status == 0 and "nothing to cut: the exact blend has rank 2, within 500" in out
    status, _, err = command(verbs.run_verb, "blend", names[0] + "e39", "--out", "x/y")
    assert status == cli.USAGE_ERROR and not (command.work / "x").exists()
    assert f"the weight 5e+38 of {blip_adapter.folder} is too large: the update of " in err


def test_names_may_contain_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:1").mkdir()
    assert _names_and_weights([r"C:\x:0.5", "b:-1e-1"]) == ([r"C:\x", "b"], [0.5, -0.1])
    assert _names_and_weights([r"C:\x", "a:1"]) == ([r"C:\x", "a:1"], [0.5, 0.5])
