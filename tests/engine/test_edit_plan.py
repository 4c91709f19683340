"""Positions, keys, plans and reports of edits, without an engine."""

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from server.engine.worker.positions import (
    ENDLESS,
    EXTRA_ARG,
    EditedRequest,
    Positions,
    PositionsError,
    edited_request,
    merged,
    overlap,
)

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("prompt", "generation", "length", "ranges"),
    [
        (None, None, 10, ()),
        ("last", None, 10, ((9, 10),)),
        ("last", None, 1, ((0, 1),)),
        ("all", None, 10, ((0, 10),)),
        ({"positions": [0, -1, -2, 4, 4]}, None, 10, ((0, 1), (4, 5), (8, 10))),
        ({"positions": [11, -11]}, None, 10, ()),
        ({"window": [-3, None]}, None, 10, ((7, 10),)),
        ({"window": [2, -2]}, None, 10, ((2, 8),)),
        ({"window": [-40, 40]}, None, 10, ((0, 10),)),
        ({"window": [6, 3]}, None, 10, ()),
        (None, "all", 10, ((10, ENDLESS),)),
        ("last", "all", 10, ((9, ENDLESS),)),
        ("last", {"window": [2, 6]}, 10, ((9, 10), (12, 16))),
        ("all", {"window": [0, None]}, 10, ((0, ENDLESS),)),
    ],
)
def test_positions_resolve_against_the_prompt(prompt, generation, length, ranges):
    assert Positions(prompt, generation).ranges(length) == ranges


@pytest.mark.parametrize(
    ("prompt", "generation"),
    [
        ("first", None),
        ({"window": [0]}, None),
        ({"window": ["a", None]}, None),
        ({"positions": ["0"]}, None),
        (None, "last"),
        (None, {"positions": [1]}),
    ],
)
def test_unknown_positions_are_refused(prompt, generation):
    with pytest.raises(PositionsError):
        Positions(prompt, generation)


def test_what_is_only_known_at_the_last_position():
    yes = (None, "last", {"positions": [-1]}, {"window": [-1, None]})
    no = ("all", {"positions": [-1, 0]}, {"positions": [9]}, {"window": [-2, None]}, {"window": [9, None]})
    assert [Positions(prompt).only_from_last() for prompt in yes] == [True] * 4
    assert [Positions(prompt).only_from_last() for prompt in no] == [False] * 5


def test_ranges_merge_and_overlap():
    assert merged([(5, 7), (1, 2), (7, 9), (3, 3), (2, 3)]) == ((1, 3), (5, 9))
    assert overlap(((1, 3), (5, 9), (12, ENDLESS)), 2, 6) == ((2, 3), (5, 6))
    assert overlap(((1, 3),), 3, 9) == ()
    assert overlap(((12, ENDLESS),), 20, 24) == ((20, 24),)


def test_a_request_carries_its_edit_as_plain_data():
    request = EditedRequest("f" * 64, "ticket", Positions({"window": [-2, None]}, "all"), True)
    params = SimpleNamespace(extra_args=request.to_extra_args())
    assert edited_request(params) == request
    assert edited_request(SimpleNamespace(extra_args=None)) is None
    assert edited_request(SimpleNamespace(extra_args={"kv_transfer_params": {}})) is None
    assert edited_request(None) is None


@pytest.mark.parametrize("foreign", ["text", 3, ["a"], {}, {"fingerprint": "f"}])
def test_what_others_send_under_our_key_is_no_edit(foreign):
    """An engine without our plane hashes blocks with the same function, and its clients may send any arguments."""
    assert edited_request(SimpleNamespace(extra_args={EXTRA_ARG: foreign})) is None


# Keys


def hashed(prompt_length: int, positions: Positions | None, fingerprint: str = "f" * 64, edits: bool = True):
    edited = EditedRequest(fingerprint, "t", positions, edits) if positions else None
    params = SimpleNamespace(extra_args=edited.to_extra_args() if edited else None)
    return SimpleNamespace(sampling_params=params, num_prompt_tokens=prompt_length)


def keys(request, blocks: int = 3, size: int = 128):
    from server.engine.worker.cachekeys import with_edit_keys

    def inner(request, start, end, mm):
        return (("lora", "d"),) if start == 0 else None, mm + 1

    wrapped = with_edit_keys(inner)
    found = [wrapped(request, size * i, size * (i + 1), i) for i in range(blocks)]
    assert [mm for _, mm in found] == [1, 2, 3]
    return [key for key, _ in found]


def test_only_blocks_with_an_edited_position_get_a_key():
    lora, f = ("lora", "d"), "f" * 64
    plain = [(lora,), None, None]
    assert keys(hashed(200, None)) == plain
    assert keys(hashed(200, Positions("last"), edits=False)) == plain
    assert keys(hashed(256, Positions("last"))) == [(lora,), (("deltaworks_edit", f, ((255, 256),)),), None]
    assert keys(hashed(257, Positions("last"))) == [(lora,), None, (("deltaworks_edit", f, ((256, 257),)),)]
    everything = keys(hashed(200, Positions("all")))
    assert everything[0] == (lora, ("deltaworks_edit", f, ((0, 128),)))
    assert everything[1] == (("deltaworks_edit", f, ((128, 200),)),)
    assert everything[2] is None
    generated = keys(hashed(200, Positions(None, "all")))
    assert generated[0] == (lora,)
    assert generated[1:] == [(("deltaworks_edit", f, (span,)),) for span in ((200, 256), (256, 384))]


def test_another_edit_or_prompt_length_gives_another_key():
    one = keys(hashed(200, Positions("last")))[1]
    assert one != keys(hashed(200, Positions("last"), fingerprint="e" * 64))[1]
    assert one != keys(hashed(201, Positions("last")))[1]


def test_installing_the_keys_twice_wraps_once(monkeypatch):
    from vllm.v1.core import block_pool, kv_cache_utils

    from server.engine.worker import cachekeys

    def inner(request, start, end, mm):
        return None, mm

    for module in (kv_cache_utils, block_pool):
        monkeypatch.setattr(module, "generate_block_hash_extra_keys", inner)
    cachekeys.install()
    once = kv_cache_utils.generate_block_hash_extra_keys
    cachekeys.install()
    assert kv_cache_utils.generate_block_hash_extra_keys is once is block_pool.generate_block_hash_extra_keys
    assert once.__wrapped__ is inner


# Plans and reports


def running(positions: Positions, length: int, at_least: float | None = None, probe: bool = False, fingerprint="f"):
    from server.engine.worker.edit_plan import RunningEdit
    from server.engine.worker.edit_report import Report
    from server.engine.worker.resident import ResidentEdit

    found = SimpleNamespace(layer=0) if probe else None
    return RunningEdit(ResidentEdit(fingerprint, positions, {1: ("table",)}, found, at_least), length, Report())


def planned(chunks, requests):
    from server.engine.worker.edit_plan import Chunk, build

    return build([Chunk(*chunk) for chunk in chunks], requests, torch.device("cpu"))


def test_rows_come_from_absolute_positions():
    requests = {"a": running(Positions("last", "all"), 10), "b": running(Positions({"positions": [0, 6]}), 20)}
    plan = planned([("plain", 0, 0, 4), ("b", 4, 5, 8), ("a", 12, 8, 1), ("plain", 13, 3, 1)], requests)
    (group,) = plan.edits[1]
    assert group.rows.tolist() == [5]  # position 6 of b; chunk [8, 9) of a ends before its last prompt position
    plan = planned([("a", 0, 9, 1), ("b", 1, 13, 7)], requests)
    assert plan.edits[1][0].rows.tolist() == [0]
    assert planned([("plain", 0, 0, 9), ("b", 9, 20, 1)], requests) is None
    assert planned([("a", 3, 40, 1)], requests).edits[1][0].rows.tolist() == [3]


def test_requests_with_the_same_edit_are_one_group_and_others_are_not():
    requests = {
        "a": running(Positions("last"), 3),
        "b": running(Positions("all"), 2),
        "c": running(Positions("last"), 3, fingerprint="g"),
    }
    plan = planned([("a", 0, 0, 3), ("b", 3, 0, 2), ("c", 5, 0, 3)], requests)
    first, second = plan.edits[1]
    assert (first.rows.tolist(), second.rows.tolist()) == ([2, 3, 4], [7])
    assert [span.at for span in first.spans] == [(0, 1), (1, 3)]


def test_rows_that_are_computed_again_are_edited_again_and_counted_once():
    requests = {"a": running(Positions("all", "all"), 6)}
    (group,) = planned([("a", 0, 0, 4)], requests).edits[1]
    assert group.spans[0].fresh == 4
    (group,) = planned([("a", 0, 0, 7)], requests).edits[1]
    assert (group.rows.tolist(), group.spans[0].fresh) == (list(range(7)), 3)


def test_a_refused_condition_takes_the_request_out_of_its_group_and_is_remembered():
    from server.engine.worker.edit_plan import without_refused

    requests = {
        name: running(Positions("last", "all"), length, at_least=0.5, probe=True)
        for name, length in (("a", 3), ("b", 4))
    }
    plan = planned([("a", 0, 0, 3), ("b", 3, 0, 4)], requests)
    assert [group.rows.tolist() for group in plan.probes[0]] == [[2, 6]]
    (group,) = plan.edits[1]
    assert without_refused(group) is None
    requests["a"].holds, requests["b"].holds = False, True
    kept = without_refused(group)
    assert (kept.rows.tolist(), kept.spans[0].at, kept.spans[0].running) == ([6], (0, 1), requests["b"])
    again = planned([("a", 0, 0, 4), ("b", 4, 4, 1)], requests)
    assert [group.rows.tolist() for group in again.edits[1]] == [[4]]


def test_forgotten_reports_leave_the_oldest_first():
    from server.engine.worker.edit_report import Reports

    reports = Reports(limit=2)
    for ticket in ("one", "two", "three"):
        reports.open(ticket).add_rows(1, [2], [1], [0.5])
    assert reports.take("one") is None
    assert reports.open("two") is reports.open("two")
    assert reports.take("two")["layers"] == [{"layer": 1, "rows": 1, "raised": 2, "lowered": 1, "rel_norm": 0.5}]
    assert reports.take("two") is None


def test_the_op_survives_compilation():
    """A compiled layer edits by the plan of the step that runs, not the one it was compiled with."""
    from vllm.config import VllmConfig
    from vllm.forward_context import set_forward_context

    from server.engine.worker.edits import EditState, LayerHook, op_library

    op_library()
    state = EditState()
    hook = LayerHook(1, state)
    layer = hook.wrap(lambda x: (x * 2, x + 0.5))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    config = VllmConfig()
    config.compilation_config.static_forward_context[hook.key] = hook
    request = running(Positions("all"), 3)
    table = SimpleNamespace(delta_and_counts=lambda h: (h, torch.ones(len(h)).int(), torch.zeros(len(h)).int()))
    request.edit.tables[1] = (table,)
    x = torch.arange(6.0).reshape(3, 2)
    with set_forward_context(None, config):
        for chunk in (None, ("a", 1, 0, 1), ("a", 0, 1, 2), None):
            state.plan = planned([chunk], {"a": request}) if chunk else None
            hidden = x * 2
            if chunk:
                rows = slice(chunk[1], chunk[1] + chunk[3])
                hidden[rows] += x[rows] * 2 + x[rows] + 0.5  # the table doubles the stream: hidden + residual
            found = compiled(x)
            assert torch.equal(found[0], hidden)
            assert torch.equal(found[1], x + 0.5)
    assert request.report.plain()["layers"] == [{"layer": 1, "rows": 3, "raised": 3, "lowered": 0, "rel_norm": 1.0}]


def test_models_whose_layers_are_unknown_have_no_edit_plane():
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.layernorm import RMSNorm

    from server.engine.worker.decoder import DecoderLayers

    config = SimpleNamespace(
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 2, get_hidden_size=lambda: 8)
    )

    class Layer(torch.nn.Module):
        def __init__(self, norm: torch.nn.Module) -> None:
            super().__init__()
            self.input_layernorm = norm

    class Model(torch.nn.Module):
        def __init__(self, *lists: list[torch.nn.Module]) -> None:
            super().__init__()
            for i, layers in enumerate(lists):
                setattr(self, f"layers{i}", torch.nn.ModuleList(layers))

    with set_current_vllm_config(VllmConfig()):
        known = [Layer(RMSNorm(8)), Layer(RMSNorm(8))]
    found = DecoderLayers.find(Model(known), config)
    assert (list(found.owned), found.count, found.width) == ([0, 1], 2, 8)
    stage = DecoderLayers.find(Model([torch.nn.Identity(), known[1]]), config)  # a pipeline stage's missing layer
    assert list(stage.owned) == [1]
    for strange in (Model(), Model(known[:1]), Model(known, known), Model([Layer(torch.nn.LayerNorm(8))] * 2)):
        assert DecoderLayers.find(strange, config) is None


def test_an_engine_without_an_edit_plane_says_so():
    from server.engine.base import EditUnavailableError, EngineEdit
    from server.engine.vllm import VLLMEngine
    from server.engine.worker.extension import DeltaWorker
    from tests.engine.bed import engine_settings

    worker = DeltaWorker()
    worker.model_runner = SimpleNamespace(lora_manager=SimpleNamespace(edits=None))
    assert worker.deltaworks_edit_report("ticket") is None
    assert worker.deltaworks_edit_unload("f") is False

    async def collective_rpc(method, args):
        return [getattr(worker, method)(*args)]

    engine = VLLMEngine(Path("unused"), engine_settings())
    engine._llm = SimpleNamespace(collective_rpc=collective_rpc)
    with pytest.raises(EditUnavailableError, match="cannot edit activations"):
        asyncio.run(engine.load_edit(EngineEdit("f" * 64, "{}")))


# The runners


class Plane:
    """Writes down what a runner tells."""

    busy = True

    def __init__(self) -> None:
        self.told: list[object] = []

    def finish(self, request_ids) -> None:
        self.told.append(sorted(request_ids))

    def admit(self, *request) -> None:
        self.told.append(request)

    def begin(self, chunks) -> None:
        self.told.append([(chunk.request_id, chunk.row, chunk.start, chunk.count) for chunk in chunks])

    def end(self) -> None:
        self.told.append("end")


class V1Runner:
    def __init__(self) -> None:
        self.input_batch = SimpleNamespace(req_ids=["a", "b"], num_computed_tokens_cpu=[4, 0])

    def execute_model(self, scheduler_output, intermediate_tensors=None):
        return self._prepare_inputs(scheduler_output, [1, 7])

    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        return "prepared"

    def _get_prompt_logprobs_dict(self, hidden_states, num_scheduled_tokens):
        return {}


class V2Runner:
    def execute_model(self, scheduler_output, intermediate_tensors=None, dummy_run=False):
        return self.prepare_inputs(scheduler_output, None, None, num_active_loras=0)

    def prepare_inputs(self, scheduler_output, batch_req_state, batch_desc, num_active_loras):
        return SimpleNamespace(req_ids=["a", "b"], query_start_loc_np=[0, 1, 8], num_computed_tokens_np=[4, 0])


@pytest.mark.parametrize(("version", "kind"), [("V1", V1Runner), ("V2", V2Runner)])
def test_both_runners_tell_the_plane_the_same(monkeypatch, version, kind):
    from server.engine.worker import runner

    class Fresh(kind):
        execute_model = kind.execute_model

    monkeypatch.setitem(sys.modules, getattr(runner, version), SimpleNamespace(GPUModelRunner=Fresh))
    runner.install()
    runner.install()
    found = Fresh()
    new = SimpleNamespace(req_id="b", sampling_params="params", prompt_len=9, num_computed_tokens=0)
    step = SimpleNamespace(finished_req_ids={"z"}, scheduled_new_reqs=[new])
    found.execute_model(step)  # a runner without a plane is as before
    plane = Plane()
    found.lora_manager = SimpleNamespace(edits=plane)
    found.execute_model(step)
    assert plane.told == [["z"], ("b", "params", 9, 0), [("a", 0, 4, 1), ("b", 1, 0, 7)], "end"]


def test_a_step_that_fails_leaves_no_plan_behind(monkeypatch):
    from server.engine.worker import runner

    class Failing(V1Runner):
        def execute_model(self, scheduler_output, intermediate_tensors=None):
            raise RuntimeError("out of memory")

    monkeypatch.setitem(sys.modules, runner.V1, SimpleNamespace(GPUModelRunner=Failing))
    runner.install()
    found, plane = Failing(), Plane()
    found.lora_manager = SimpleNamespace(edits=plane)
    with pytest.raises(RuntimeError, match="out of memory"):
        found.execute_model(SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=[]))
    assert plane.told == [[], "end"]
