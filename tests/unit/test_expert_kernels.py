"""What vLLM picks to run experts, on GPUs that this machine does not have, and whether it is re-routed rightly."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
import vllm
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.model_executor.layers.fused_moe import modular_kernel

from sere_dist.method.rerouting import reroute
from sere_dist.method.slots import merge_repeats
from sere_dist.testing.expert_choice import CAPABILITIES, LAYOUTS, QUANTISATIONS, chosen, pretended_gpu, verdict
from sere_dist.vllm_plugin.expert_kernels import DISPATCHERS, EXPERTS, MONOLITHIC, Placement, merges, merges_repeats
from tests.support.expert_routing import bit_matrix_routing, first_slot_routing, messages_to_an_expert


@pytest.mark.parametrize("capability", CAPABILITIES.values(), ids=CAPABILITIES)
def test_every_choice_of_vllm_is_rerouted_or_refused_with_a_cure_that_works(capability):
    verdicts = {}
    with pretended_gpu(capability):
        for quantisation in QUANTISATIONS:
            for layout in LAYOUTS:
                moe_backend, where = "auto", layout
                for _step in range(3):  # a cure may lead to a class that needs another
                    try:
                        experts = chosen(quantisation, where, moe_backend)
                    except (NotImplementedError, ValueError):
                        assert (moe_backend, where) == ("auto", layout), "vLLM has no kernel for our cure"
                        break
                    try:
                        verdicts[quantisation, layout.name] = verdict(experts, where)
                        break
                    except ValueError as refusal:
                        if backend := re.search(r'moe_backend="(\w+)"', str(refusal)):
                            moe_backend = backend[1]
                        backend = re.search(r'all2all_backend="(\w+)"', str(refusal))
                        if backend is not None:
                            (where,) = (
                                each
                                for each in LAYOUTS
                                if each.all2all_backend == backend[1] and each.data_parallel > 1
                            )
                else:
                    pytest.fail(f"{quantisation}, {layout.name}: the cure is refused, too")
    single = [verdicts[quantisation, "1 GPU"] for quantisation in QUANTISATIONS]
    assert len(single) == len(QUANTISATIONS), "one GPU runs them all"
    assert {"merged", "repeats"} == set(verdicts.values())


def test_classes_that_take_no_repeats_get_none():
    split = Placement(is_split=True)
    for experts, takes in EXPERTS.items():
        for dispatcher, sends in DISPATCHERS.items():
            try:
                merged = merges(experts, dispatcher, split)
            except ValueError as refusal:
                assert "set " in str(refusal)
                continue
            assert merged or (takes.repeats and sends.repeats)
            assert not merged or (takes.empty != "never" and sends.empty != "never")


def test_the_classes_are_vllms():
    """A class that is renamed, or comes anew, is refused; a name that is none of vLLM's would be a slip of ours."""
    known = {each.__name__: each for each in _subclasses(modular_kernel.FusedMoEExperts)}
    with pretended_gpu(90):
        known |= {each.__name__: each for each in _subclasses(modular_kernel.FusedMoEExperts)}
    assert EXPERTS.keys() <= known.keys()
    assert MONOLITHIC.keys() <= known.keys()
    assert not any(known[name].is_monolithic() for name in EXPERTS if not inspect.isabstract(known[name]))


def _subclasses(cls):
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)


@pytest.mark.parametrize(
    ("experts", "dispatcher", "placement", "message"),
    [
        ("NewExperts", "MoEPrepareAndFinalizeNoDPEPModular", Placement(), 'whether NewExperts .* moe_backend="triton"'),
        ("TritonExperts", "NewDispatcher", Placement(True), 'all2all_backend="allgather_reducescatter"'),
        (
            "BatchedTritonExperts",
            "DeepEPLLPrepareAndFinalize",
            Placement(True, is_linear=False),
            'expert_placement_strategy="linear"',
        ),
        ("TritonWNA16Experts", "DeepEPV2PrepareAndFinalize", Placement(True), "can't run re-routed slots together"),
        (
            "FlashInferExperts",
            "FlashInferNVLinkOneSidedPrepareAndFinalize",
            Placement(True, experts_per_rank=1),
            "can't run re-routed slots together",
        ),
    ],
)
def test_what_can_not_be_rerouted_is_refused(experts, dispatcher, placement, message):
    with pytest.raises(ValueError, match=message):
        merges(experts, dispatcher, placement)


def test_rows_that_share_a_scale_are_not_left_empty():
    assert merges("TritonExperts", "DeepEPV2PrepareAndFinalize", Placement(True))
    with pytest.raises(ValueError, match="can't run"):
        merges("TritonExperts", "DeepEPV2PrepareAndFinalize", Placement(True), scales_rows_together=True)


def runner(experts: str, dispatcher: str = "MoEPrepareAndFinalizeNoDPEPModular", is_monolithic: bool = False):
    """A loaded layer, as far as it matters which classes run it."""
    config = SimpleNamespace(quant_dtype=None, a2_scale=None, per_act_token_quant=False, block_shape=None)
    kernel = SimpleNamespace(
        fused_experts=type(experts, (), {"quant_config": config})(), prepare_finalize=type(dispatcher, (), {})()
    )
    return SimpleNamespace(
        routed_experts=SimpleNamespace(quant_method=SimpleNamespace(moe_kernel=kernel), expert_map=None),
        is_monolithic=is_monolithic,
        expert_placement_strategy="linear",
        moe_config=SimpleNamespace(num_local_experts=128),
    )


def test_all_layers_get_one_form(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    assert merges_repeats({0: runner("FlashInferExperts"), 1: runner("FlashInferExperts")})
    assert not merges_repeats({0: runner("TritonExperts")})
    with pytest.raises(ValueError, match="different expert kernels"):
        merges_repeats({0: runner("FlashInferExperts"), 1: runner("TritonExperts")})


def test_empty_slots_are_not_returned_as_experts():
    assert not merges_repeats({0: runner("TritonExperts")}, returns_ids=True)
    with pytest.raises(ValueError, match=r"or enable_return_routed_experts=False"):
        merges_repeats({0: runner("FlashInferExperts")}, returns_ids=True)


def test_a_layer_that_chooses_experts_itself_is_refused():
    with pytest.raises(ValueError, match=r'layer 3: OAITritonMxfp4ExpertsMonolithic .* set moe_backend="marlin"'):
        merges_repeats({3: runner("OAITritonMxfp4ExpertsMonolithic", is_monolithic=True)})
    with pytest.raises(ValueError, match=r'set moe_backend="triton" \(bfloat16, FP8\) or "marlin"'):
        merges_repeats({3: runner("NewMonolithic", is_monolithic=True)})


def test_a_layer_that_does_not_name_its_kernel_is_refused():
    layer = runner("TritonExperts")
    layer.routed_experts.quant_method.moe_kernel = None
    with pytest.raises(ValueError, match="layer 3 does not say which kernel"):
        merges_repeats({3: layer})


def test_releases_whose_kernels_were_not_read_get_no_merged_slots(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.30.0+cu129")
    assert not merges_repeats({0: runner("TritonExperts")})
    with pytest.raises(ValueError, match=r"install vLLM 0\.31 or later"):
        merges_repeats({0: runner("FlashInferExperts")})


@pytest.mark.parametrize("all2all_backend", ["allgather_reducescatter", "deepep_v2", "flashinfer_nvlink_one_sided"])
def test_the_dispatchers_that_we_name_keep_cuda_graphs(all2all_backend):
    for backend, kept in ((all2all_backend, True), ("deepep_high_throughput", False)):
        config = CompilationConfig(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, mode=3)
        config.set_splitting_ops_for_v1(all2all_backend=backend, data_parallel_size=8)
        assert (config.cudagraph_mode != CUDAGraphMode.NONE) == kept


def step_of_many_tokens(skew: float = 0.0):
    """300 tokens that chose 8 of 128 experts; the first 8 decode. Returns ids before and after, and merged ids."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 128, generator=generator) + skew * torch.randn(128, generator=generator)
    weights_TK, ids_TK = logits.softmax(-1).topk(8)
    similarity_EE = torch.rand(128, 128, generator=generator)
    valid_T = torch.arange(300) < 8
    new_TK = reroute(weights_TK, ids_TK, similarity_EE, select_top_k=2, valid_T=valid_T)
    return ids_TK, new_TK, merge_repeats(weights_TK, new_TK, valid_T)[1]


def test_flashinfers_prologue_loses_repeats_and_runs_merged_slots():
    before, repeated, merged = step_of_many_tokens()
    assert first_slot_routing(before, 128) == []
    lost = first_slot_routing(repeated, 128)
    assert lost and all(token < 8 for token, _column in lost)
    assert first_slot_routing(merged, 128) == []


def test_openais_routing_mixes_up_rows_with_repeats_and_runs_merged_slots():
    before, repeated, merged = step_of_many_tokens()
    assert bit_matrix_routing(before, 128) == []
    wrong = bit_matrix_routing(repeated, 128)
    assert any(token >= 8 for token, _column in wrong), "rows that were not re-routed"
    assert bit_matrix_routing(merged, 128) == []


def test_deepeps_buffers_overflow_with_repeats_and_hold_merged_slots():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(256, 128, generator=generator) + 2 * torch.randn(128, generator=generator)
    weights_TK, ids_TK = logits.softmax(-1).topk(8)
    repeated = reroute(weights_TK, ids_TK, torch.rand(128, 128, generator=generator), select_top_k=1)
    room = len(ids_TK)  # DeepEP's, where a step has as many tokens as it may have
    assert messages_to_an_expert(ids_TK) <= room < messages_to_an_expert(repeated)
    assert messages_to_an_expert(merge_repeats(weights_TK, repeated)[1]) <= room
