"""Parameters of the full-size published checkpoints, counted on the meta device."""

import json

import published
import pytest
import torch

from lora_engine.lora.injection import count_parameters, inject, select
from lora_engine.models.pretrained import build_from_config

# The intended targets of the published training scripts, whose prefixes matched fewer layers.
BLIP_INTENDED = (
    r"text_decoder\.bert\.encoder\.layer\.\d+\."
    r"((attention|crossattention)\.self\.(query|value)|(intermediate|output)\.dense)"
)
VIT_GPT2_INTENDED = r"decoder\.transformer\.h\.\d+\.((attn|crossattention)\.c_attn|mlp\.c_fc)"
BOTH_GROUPS = ["attention", "feed_forward"]


@pytest.fixture
def build(tmp_path):
    """Builds the model that a configuration describes, on the meta device."""
    def build(config: dict) -> torch.nn.Module:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with torch.device("meta"):
            return build_from_config(tmp_path)
    return build


def size(module: torch.nn.Module) -> int:
    return sum(count_parameters(module))


def test_blip_base_has_the_published_number_of_parameters(build):
    model = build(published.BLIP)
    assert size(model.encoder) == 86_090_496
    assert size(model.decoder) == 137_881_148
    assert size(model) == 223_971_644


def test_vit_gpt2_has_the_published_number_of_parameters_without_its_pooler(build):
    model = build(published.VIT_GPT2)
    width = published.VIT_GPT2["encoder"]["hidden_size"]
    pooler = width * width + width
    assert size(model.encoder) == 86_389_248 - pooler
    assert size(model.decoder) == 152_806_656
    assert size(model) == 238_605_312 == 239_195_904 - pooler


def test_an_untied_head_counts_by_itself(build):
    model = build(published.BLIP)
    head, embedding = model.tied_head
    assert model.get_parameter(head) is model.get_parameter(embedding)
    untied = torch.nn.Parameter(torch.empty_like(model.get_parameter(head)))
    model.get_submodule(head.rpartition(".")[0]).weight = untied
    assert size(model) == 247_414_076


@pytest.mark.parametrize("config, targets, num_modules, num_trainable, num_frozen", [
    (published.BLIP, BOTH_GROUPS, 120, 1_916_928, 223_971_644),
    (published.VIT_GPT2, BOTH_GROUPS, 84, 1_695_744, 238_605_312),
    (published.BLIP, BLIP_INTENDED, 72, 1_327_104, 223_971_644),
    (published.VIT_GPT2, VIT_GPT2_INTENDED, 36, 884_736, 238_605_312),
    # what BLIP's script in fact adapted: its feed-forward targets matched nothing
    (published.BLIP, ["query", "value"], 48, 589_824, 223_971_644),
], ids=["blip", "vit_gpt2", "blip_intended", "vit_gpt2_intended", "blip_as_run"])
def test_lora_of_rank_8_adds_the_published_number(
    build, config, targets, num_modules, num_trainable, num_frozen
):
    model = build(config)
    plan = inject(model, targets, rank=8)
    assert len(plan.modules) == num_modules
    assert (plan.num_trainable, plan.num_frozen) == (num_trainable, num_frozen)
    assert count_parameters(model) == (num_trainable, num_frozen)


@pytest.mark.parametrize("config, per_rank", [
    (published.BLIP, 239_616), (published.VIT_GPT2, 211_968)
], ids=["blip", "vit_gpt2"])
@pytest.mark.parametrize("rank", [1, 16])
def test_adapter_grows_in_proportion_to_its_rank(build, config, per_rank, rank):
    assert inject(build(config), BOTH_GROUPS, rank=rank).num_trainable == rank * per_rank


def test_groups_split_the_decoders_linear_layers_and_leave_the_rest(build):
    for config, num_attention, num_feed_forward in (
        (published.BLIP, 96, 24), (published.VIT_GPT2, 60, 24)
    ):
        model = build(config)
        attention, feed_forward = (select(model, [group]) for group in BOTH_GROUPS)
        assert (len(attention), len(feed_forward)) == (num_attention, num_feed_forward)
        assert not set(attention) & set(feed_forward)
        assert select(model, r".*") == select(model, BOTH_GROUPS)  # whatever may be adapted


def test_output_dense_also_matches_attention_outputs_as_in_peft(build):
    names = {path.split(".", 5)[-1] for path in select(build(published.BLIP), ["output.dense"])}
    assert names == {"output.dense", "attention.output.dense", "crossattention.output.dense"}
